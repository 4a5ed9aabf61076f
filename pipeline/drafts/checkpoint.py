"""Draft checkpoints: artifacts of kind "draft" that state which target they belong to, and prove it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig, check
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.errors import ArtifactError, ConfigError
from pipeline.identity import differing
from pipeline.target import Target

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ALGORITHMS: dict[str, type[Draft]] = {"dspark": DSparkDraft, "dflash": DSparkDraft, "eagle3": Eagle3Draft}


def make_draft(config: DraftConfig, target: Target, d2t: torch.Tensor) -> Draft:
    """A freshly initialised draft of a resolved config, with the target's embedding and lm_head, borrowed or copied."""
    family = target.family
    head = getattr(family.lm_head, "weight", None)
    if head is None:
        raise ArtifactError("The target's lm_head was prepacked; make the draft before the engine takes the target.")
    return ALGORITHMS[config.algorithm](
        config,
        family.embed_tokens.weight,
        head,
        d2t,
        embed_scale=family.embed_scale,
        logit_softcap=family.logit_softcap,
    )


def save_draft(
    out: Path | str,
    draft: Draft,
    *,
    target: dict[str, str],
    config: dict[str, Any],
    inputs: dict[str, str],
    state: Mapping[str, torch.Tensor] | None = None,
    info: dict[str, Any] | None = None,
) -> artifact.Manifest:
    """Writes a draft artifact: `model.safetensors` (fp32, nothing borrowed) and `config.json`.

    Args:
        target: identity of the target. config, inputs: of the stage, for the manifest.
        state: tensors to write instead of the module's own.
    """
    tensors = dict(state or draft.trainable_state())
    with artifact.create(out, "draft", config=config, inputs=inputs, target=target) as staging:
        save_file(
            {
                n: t.detach().to("cpu", t.dtype if t.dtype == torch.int64 else torch.float32).contiguous()
                for n, t in tensors.items()
            },
            staging.path / WEIGHTS,
        )
        artifact.write_json(staging.path / CONFIG, dataclasses.asdict(draft.config))
        staging.counts["parameters"] = sum(p.numel() for p in draft.parameters())
        staging.info.update(info or {})
    return artifact.load(out, "draft", verify=False)


def differences(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """What of a file's tensors is not as a draft expects: missing, unknown, of another shape, or not finite."""
    problems = [f"{n} is missing" for n in expected.keys() - tensors.keys()]
    problems += [f"{n} is unknown" for n in tensors.keys() - expected.keys()]
    problems += [
        f"{n} has shape {list(tensors[n].shape)}, the config gives {list(expected[n].shape)}"
        for n in expected.keys() & tensors.keys()
        if expected[n].shape != tensors[n].shape
    ]
    return problems + [
        f"{n} has values that are not finite" for n, t in tensors.items() if not bool(t.isfinite().all())
    ]


def load_draft(path: Path | str, target: Target) -> Draft:
    """Loads a draft for a target.

    Raises:
        ArtifactError: damaged, made for another target, or not fitting it; the message lists every difference.
    """
    path = Path(path)
    if (path / CONFIG).is_file() and not (path / artifact.MANIFEST).is_file():
        raise ArtifactError(
            f"{path} is no draft artifact: it has no {artifact.MANIFEST}. If it is a checkpoint of another project, "
            f"jobs/convert.py makes a draft of it: convert.checkpoint={path}."
        )
    manifest = artifact.load(path, "draft")
    mine, theirs = target.identity.as_dict(), manifest.target or {}
    told = [
        f"{key}: the draft's is {theirs.get(key)!r}, the target's is {mine.get(key)!r}"
        for key in differing(theirs, mine)
    ]
    if told:
        raise ArtifactError(
            f"The draft at {path} belongs to another target. " + "; ".join(told) + ". Train a draft for this one."
        )
    try:
        raw = json.loads((path / CONFIG).read_text())
        config = DraftConfig(**raw)
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as e:
        raise ArtifactError(f"The draft at {path} can't be read: {e}") from None
    try:
        check(config, target.hidden_size, target.vocab_size, target.num_layers)
    except ConfigError as e:
        raise ArtifactError(f"The draft at {path} does not fit the target. {e}") from None
    d2t = tensors.get("d2t")
    if d2t is None or d2t.dim() != 1 or not len(d2t) or bool((d2t.diff() <= 0).any()):
        raise ArtifactError(f"The draft at {path} has no ascending draft vocabulary (tensor d2t).")
    if len(outside := d2t[(d2t < 0) | (d2t >= target.vocab_size)]):
        raise ArtifactError(
            f"The draft at {path} has token {int(outside[0])} in its vocabulary; the target has {target.vocab_size}."
        )
    if config.draft_vocab_size and len(d2t) != config.draft_vocab_size:
        raise ArtifactError(
            f"The draft at {path} has {len(d2t)} tokens in its vocabulary (tensor d2t), its config says "
            f"{config.draft_vocab_size}."
        )
    draft = make_draft(config, target, d2t)
    problems = differences(tensors, draft.state_dict())
    if "temperatures" in tensors and bool((tensors["temperatures"] <= 0).any()):
        problems.append("temperatures must be above 0")
    if problems:
        raise ArtifactError(f"The draft at {path} does not match its config: " + "; ".join(sorted(problems)) + ".")
    draft.load_state_dict(tensors)
    return draft.to(target.device).eval()
