"""A checkpoint of another project as a draft artifact: what training makes, so that every stage behind it takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import save_draft
from pipeline.drafts.formats import files
from pipeline.drafts.formats.engines import FORMATS
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import load_identity, load_target

if TYPE_CHECKING:
    from pipeline.config import ConvertConfig, TargetConfig

_CHECKPOINT = "checkpoint"
_PARTS = (files.CONFIG, files.WEIGHTS, files.TEMPERATURES)


def convert_draft(
    config: ConvertConfig,
    target: TargetConfig,
    out: Path,
    cache_dir: Path,
    *,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Reads a checkpoint for the target; returns the manifest (kind "draft") of what is at `out`, made now or before.

    Embedding and lm_head that are not the target's become the draft's own. Such a file may belong to another target
    altogether, which no format proves: what the draft is worth here is for `evaluate` to say.

    Raises:
        ConfigError: no checkpoint is named, or it is of no format that is read.
        ArtifactError: the checkpoint is damaged or does not fit the target, or `out` holds a draft that was trained.
    """
    if not config.checkpoint:
        raise ConfigError("convert.checkpoint has no value; give a directory: convert.checkpoint=/models/draft.")
    path = Path(config.checkpoint).absolute()
    format = config.format or recognised(path)
    identity = load_identity(target, cache_dir).as_dict()
    plain = {"format": format, "target": {"dtype": target.dtype}}  # what the file's matrices are compared in
    held = {name: artifact.sha256_file(path / name) for name in _PARTS if (path / name).is_file()}
    inputs = {_CHECKPOINT: artifact.digest_json(held)}
    if (done := artifact.current(out, "draft", config=plain, inputs=inputs, target=identity)) is not None:
        return done
    _spare_trained(out)
    begin()
    loaded = load_target(target, cache_dir)
    draft = FORMATS[format].read(path, loaded)
    print(f"convert: {told(draft)}", flush=True)
    for matrix, setting in files.owned(draft).items():
        print(f"convert: {matrix} is not the target's: the draft keeps its own ({setting})", flush=True)
    info: dict[str, Any] = {"converted": {"format": format, "checkpoint": str(path)}}
    return save_draft(out, draft, target=identity, config=plain, inputs=inputs, info=info)


def recognised(path: Path) -> str:
    """The format of a checkpoint, by its config.json.

    Raises:
        ConfigError: it is of none. ArtifactError: there is none, or it can't be read.
    """
    try:
        raw = json.loads((path / files.CONFIG).read_text())
    except (OSError, ValueError) as e:
        raise ArtifactError(
            f"{path} is no checkpoint that can be read ({e}). convert.checkpoint must be a directory with "
            f"{files.CONFIG} and {files.WEIGHTS}; download a model of the hub first."
        ) from None
    found = [name for name, format in FORMATS.items() if isinstance(raw, dict) and format.recognises(raw)]
    if not found:
        what = files.first_architecture(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ConfigError(f"{path} is of no format that is read ({what}); there are: {', '.join(FORMATS)}.")
    return found[0]


def told(draft: Draft) -> str:
    """A draft in one line."""
    c = draft.config
    parameters = sum(p.numel() for p in draft.parameters())
    layers = f"{c.num_layers} layer{'s' if c.num_layers > 1 else ''}"
    return (
        f"{c.algorithm}, {layers}, {c.tokens_per_block} tokens per block, taps {c.target_layer_ids}, vocabulary "
        f"{len(draft.d2t)} of {draft.embed.shape[0]}; {parameters / 1e6:.1f} M parameters"
    )


def _spare_trained(out: Path) -> None:
    """Raises ArtifactError if a draft that was made otherwise is at `out`."""
    try:
        there = artifact.load(out, "draft", verify=False)
    except ArtifactError:
        return
    if _CHECKPOINT not in there.inputs:
        raise ArtifactError(f"{out} holds a draft that this run trained. Convert under another name: name=...")


def converted_algorithm(draft_dir: Path) -> str | None:
    """The algorithm of a draft that a checkpoint was converted to; None where there is none or it was trained."""
    try:
        there = artifact.load(draft_dir, "draft", verify=False)
        if _CHECKPOINT not in there.inputs:
            return None
        return str(json.loads((draft_dir / "config.json").read_text())["algorithm"])
    except (ArtifactError, OSError, ValueError, KeyError):
        return None  # whoever needs the draft itself says what is wrong with it
