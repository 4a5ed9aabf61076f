"""Loading a target and proving which one it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.artifact import digest_json, sha256_file, write_json
from pipeline.errors import ConfigError, DraftlineError
from pipeline.identity import TargetIdentity
from pipeline.target.families import Family, check_family, family_of
from pipeline.target.obtain import obtain

if TYPE_CHECKING:
    from pipeline.config import TargetConfig

# Rotary base, norms and layer kinds are in the config: with another one the same weights are another model. These
# entries are not: where it came from, who wrote it, and the dtype that target.dtype overrides.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_TEMPLATES = Path(__file__).parent / "templates"
# The last two are neither of the others; of a config whose values are of a wrong type, transformers raises the last.
_UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


class Target:
    """A frozen causal language model with its tokenizer and identity."""

    def __init__(self, model: Any, tokenizer: Any, identity: TargetIdentity) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity

    @cached_property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """The output matrix [V, D]; not there once an engine has prepacked the target."""
        weight = self.family.lm_head.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Embedding rows (may exceed the tokenizer's tokens)."""
        return int(self.family.embed_tokens.weight.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        return self.family.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.family.embed_tokens.weight.dtype

    def text(self, token_ids: Sequence[int]) -> str:
        """What tokens say, special ones left out."""
        said = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(said)

    @cached_property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text: the generation config's, else the config's, else the tokenizer's."""
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            eos = getattr(source, "eos_token_id", None)
            if eos is not None:
                return sorted(eos) if isinstance(eos, (list, tuple)) else [int(eos)]
        return []

    @cached_property
    def unused_token(self) -> int:
        """A token id that no text of the target contains: the highest padded embedding row, or else the lowest special
        token that is neither eos nor bos nor written by the chat template.

        Raises:
            ConfigError: there is none.
        """
        used = {*self.eos_ids, self.tokenizer.bos_token_id}
        if self.vocab_size > len(self.tokenizer):
            return self.vocab_size - 1
        template = str(self.tokenizer.chat_template or "")
        special = [
            i
            for i in self.tokenizer.all_special_ids
            if i not in used and str(self.tokenizer.convert_ids_to_tokens(i)) not in template
        ]
        if special:
            return int(min(special))
        raise ConfigError(
            f"Every token of {self.identity.id} may occur in its texts, so none stands for a draft's empty slots by "
            "itself. Name one: draft.mask_token_id=<a token id that your corpus does not use>."
        )


def load_tokenizer(config: TargetConfig, cache_dir: Path) -> Any:
    """The target's tokenizer, with the configured chat template if there is one.

    Raises:
        DraftlineError: no tokenizer there, or the template file is missing.
    """
    path = obtain(config, cache_dir)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except _UNREADABLE as e:  # a config's fault too: it is read where the tokenizer does not say its class
        raise DraftlineError(f"{path} has no tokenizer that transformers can load: {_first_line(e)}") from None
    if config.chat_template:
        own = _TEMPLATES / f"{config.chat_template}.jinja"
        file = own if own.is_file() else Path(config.chat_template)
        if not file.is_file():
            shipped = ", ".join(sorted(f.stem for f in _TEMPLATES.glob("*.jinja")))
            raise DraftlineError(
                f"target.chat_template={config.chat_template} is neither a file nor one of the templates that come "
                f"with draftline ({shipped})."
            )
        tokenizer.chat_template = file.read_text()
    return tokenizer


def target_id(config: TargetConfig) -> str:
    """The id by which a target goes in identities and names: as configured, or its directory's name."""
    return Path(config.path).resolve().name if Path(config.path).is_dir() else config.path


def load_identity(config: TargetConfig, cache_dir: Path, tokenizer: Any = None) -> TargetIdentity:
    """The identity alone, without loading weights (digests are kept in `cache_dir`, keyed by size and time)."""
    path = obtain(config, cache_dir)
    tokenizer = tokenizer or load_tokenizer(config, cache_dir)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise DraftlineError(f"{path} has no .safetensors file; convert the target's weights to safetensors first.")
    digest = digest_json([_cached_digest(f, Path(cache_dir)) for f in weights])
    files = [sha256_file(path / f) for f in _TOKENIZER_FILES if (path / f).is_file()]
    tokens = digest_json([files, tokenizer.chat_template])
    # The hub's cache names a snapshot's directory after its commit; a configured revision may be a moving branch.
    commit = path.name if path.parent.name == "snapshots" else ""
    return TargetIdentity(
        target_id(config), commit or config.revision or digest[:12], digest, _config_digest(path), tokens
    )


def load_config(path: Path) -> Any:
    """A target's transformers config, as it is (`get_text_config()` has the text model's), without its weights.

    Args:
        path: the target's directory, or a config.json.
    Raises:
        DraftlineError: it is unreadable, or of a family that is not supported.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except _UNREADABLE as e:
        raise _unreadable(path, e) from None
    check_family(config.model_type)
    return config


def load_target(config: TargetConfig, cache_dir: Path) -> Target:
    """Loads the target as configured.

    Raises:
        DraftlineError: it is missing, unreadable, or of a family that is not supported.
    """
    path = obtain(config, cache_dir)
    tokenizer = load_tokenizer(config, cache_dir)
    if config.device != "cpu" and not torch.cuda.is_available():
        raise DraftlineError(f"target.device={config.device!r}, but this process sees no GPU. Use target.device=cpu.")
    load_config(path)  # before reading the weights
    try:
        transformers.utils.logging.disable_progress_bar()  # one line per tensor in a job's log
        placed = {"device_map": "auto"} if config.device == "auto" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **placed)
    except _UNREADABLE as e:
        raise _unreadable(path, e) from None
    if config.device != "auto":
        model = model.to(config.device)  # type: ignore[arg-type]
    target = Target(model, tokenizer, load_identity(config, cache_dir, tokenizer))
    _ = target.family
    return target


def load_borrowed(config: TargetConfig, cache_dir: Path) -> Target:
    """The target with no more of its weights than a draft borrows: embedding, final norm and lm_head, on CPU.

    Its other parameters are on the meta device: they have shapes, but no memory, and nothing of them is read. A
    checkpoint that keeps these three in a form of its own is loaded whole.

    Raises:
        DraftlineError: as `load_target`.
    """
    path = obtain(config, cache_dir)
    tokenizer = load_tokenizer(config, cache_dir)
    known = load_config(path)
    try:
        model = _without_layers(path, known, getattr(torch, config.dtype))
    except _UNREADABLE as e:
        raise _unreadable(path, e) from None
    if model is None:
        return load_target(dataclasses.replace(config, device="cpu"), cache_dir)
    return Target(model, tokenizer, load_identity(config, cache_dir, tokenizer))


def _without_layers(path: Path, known: Any, dtype: torch.dtype) -> Any | None:
    """The model with embedding, final norm and lm_head alone; None where the files have no plain tensors of them."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # Gemma's scale of the embedding is a buffer
        model = transformers.AutoModelForCausalLM.from_config(known, dtype=dtype)
    family = family_of(model)
    names = {module: name for name, module in model.named_modules()}
    embed, norm, head = (f"{names[m]}.weight" for m in (family.embed_tokens, family.final_norm, family.lm_head))
    tied = head in model.all_tied_weights_keys
    given = _tensors(path, model, {embed, norm, head})
    for one, other in ((embed, head), (head, embed)):
        if tied and one not in given and other in given:
            given[one] = given[other]
    if tied and given.keys() >= {embed, head} and torch.equal(given[embed], given[head]):
        given[head] = given[embed]
    for name in (embed, norm, head):
        tensor, there = given.get(name), model.get_parameter(name)
        if tensor is None or not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.shape != there.shape:
            return None
    exact = model._keep_in_fp32_modules_strict or ()
    for name in (embed, norm, head):
        place, kind = name.removesuffix(".weight"), name.split(".")[-2]
        weight = given[name].to(torch.float32 if kind in exact else dtype)
        model.get_submodule(place).weight = nn.Parameter(weight, requires_grad=False)
    if given[head] is given[embed]:
        family.lm_head.weight = family.embed_tokens.weight
    with contextlib.suppress(OSError):  # without the file, what the model's config says
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _tensors(path: Path, model: Any, wanted: set[str]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors that become the `wanted` parameters of its model as they are; others are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    index = path / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    parameters = model.state_dict()
    out: dict[str, torch.Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            return {}
        with safe_open(path / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
                if name not in parameters and key in parameters:
                    name, converted = key, None
                if name in wanted and converted is None:
                    out[name] = opened.get_tensor(key)
    return out


def _cached_digest(file: Path, cache_dir: Path) -> str:
    stat = file.stat()
    key = digest_json([str(file.resolve()), stat.st_size, stat.st_mtime_ns])[:24]
    memo = cache_dir / "digests" / f"{key}.json"
    if memo.is_file():
        return str(json.loads(memo.read_text())["sha256"])
    digest = sha256_file(file)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_json(memo, {"sha256": digest, "file": file.name})
    return digest


def _config_digest(path: Path) -> str:
    try:
        raw = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise DraftlineError(f"{path} has no config.json that can be read: {_first_line(e)}") from None
    return digest_json({k: v for k, v in raw.items() if k not in _NOT_THE_MODEL})


def _unreadable(path: Path, e: Exception) -> DraftlineError:
    """What to tell where a model can't be loaded; of damaged weights, in which file and what to do."""
    if isinstance(e, SafetensorError):
        for file in sorted(path.glob("*.safetensors")):  # the library's own message names none
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as damage:
                return DraftlineError(
                    f"{file} is cut short or damaged ({_first_line(damage)}). Delete it and copy or download the "
                    "target's weights again."
                )
    if isinstance(e, StrictDataclassError):  # which value it is stands in its second line
        return DraftlineError(f"{path} has a config.json that transformers does not take: {' '.join(str(e).split())}")
    return DraftlineError(f"{path} is not a model that transformers can load: {_first_line(e)}")


def _first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
