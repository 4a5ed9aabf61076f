"""DeepSpec's checkpoints (MIT; `DSparkModel` and `Eagle3Model` of Qwen3 and Gemma4), with a flat config.json.

Its DFlash is its DSpark without either head.
Embedding and lm_head, the target's or the draft's own, are in the file, full vocabulary. Layer ids count as ours do: id
L is the output of decoder layer L. Slots are DSpark's in both block drafters: the anchor's slot predicts. Eagle3 has
five tapped layers and QK norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.formats import eagle3, files, gemma4, qwen3
from pipeline.drafts.formats.files import Obstacle
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target

_ARCHITECTURES = {f"{shape}{kind}Model": kind.lower() for shape in ("Qwen3", "Gemma4") for kind in ("DSpark", "Eagle3")}
_ANCHORS = 512  # of a training sequence, which its readers insist on
_STEP_DECAY = 0.8  # what a step of the unrolled loss weighs of the one before; nothing that a reader computes


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return files.first_architecture(raw) in _ARCHITECTURES


def obstacles(draft: Draft) -> list[Obstacle]:
    """Why a draft can't be written in this format; empty if it can."""
    c = draft.config
    found = gemma4.obstacles(draft) if c.layer_family == "gemma4" else qwen3.obstacles(draft, "DeepSpec")
    if not files.full_vocabulary(draft):
        found.append(
            Obstacle(
                f"DeepSpec's checkpoints hold the whole vocabulary of {draft.embed.shape[0]} tokens; this draft "
                f"proposes {len(draft.d2t)} of them.",
                {"draft.draft_vocab_size": "0"},
            )
        )
    if c.algorithm == "eagle3":
        found += eagle3.taps_obstacle(draft, "DeepSpec's Eagle3", 5)
        found += eagle3.residual_obstacle(draft, "DeepSpec's Eagle3")
    if not c.sample_from_anchor:
        found.append(
            Obstacle(
                "DeepSpec's slots all predict; in this draft the anchor's slot does not.",
                {"draft.sample_from_anchor": "true"},
            )
        )
    if any(c.sliding_windows):
        found.append(
            Obstacle(
                f"DeepSpec's drafts have full attention; this draft has sliding_windows={c.sliding_windows}.",
                {"draft.sliding_windows": "[]"},
            )
        )
    return found


def write(
    draft: Draft,
    target: Target,
    out: Path | str,
    *,
    inputs: dict[str, str],
    settings: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> artifact.Manifest:
    """Writes a draft as an artifact of kind "export" (see `files.save`).

    Raises:
        ConfigError: the format can't hold this draft (see `obstacles`).
    """
    if why := obstacles(draft):
        raise ConfigError(" ".join(map(str, why)))
    c = draft.config
    gemma = c.layer_family == "gemma4"
    config = {
        **(gemma4 if gemma else qwen3).settings_of(draft, target),
        "architectures": [f"{'Gemma4' if gemma else 'Qwen3'}{'Eagle3' if c.algorithm == 'eagle3' else 'DSpark'}Model"],
        "num_target_layers": target.num_layers,
        "target_layer_ids": c.target_layer_ids,
    }
    if c.algorithm == "eagle3":
        config |= {
            "draft_num_hidden_layers": c.num_layers,
            "ttt_length": c.block_size,
            "step_loss_decay": _STEP_DECAY,
            "target_model_name_or_path": target.identity.id,
        }
    else:
        config |= {"block_size": c.block_size, "mask_token_id": c.mask_token_id, "num_anchors": _ANCHORS}
        config |= files.heads_of(c)
    tensors = files.tensors_of(draft) | {files.EMBED: draft.embed, files.LM_HEAD: draft.lm_rows}
    return files.save(
        out, draft, target, tensors, config, project="deepspec", inputs=inputs, settings=settings, texts=texts
    )


def read(path: Path | str, target: Target) -> Draft:
    """Reads a checkpoint for a target.

    Temperatures are ones unless `temperatures.json` lies beside it.

    Raises:
        ArtifactError: another architecture, or fields or tensors that don't fit the target; the message lists every
            difference.
    """
    path = Path(path)
    raw, tensors = files.load(path, "DeepSpec")
    algorithm = files.architecture(path, raw, _ARCHITECTURES)
    if any(kind != "full_attention" for kind in raw.get("layer_types", [])):
        raise ArtifactError(f"{path} has layer_types {raw['layer_types']}; DeepSpec's drafts have full attention only.")
    if algorithm == "eagle3":
        return eagle3.read(
            path,
            raw,
            tensors,
            target,
            layer_ids=files.present(path, raw.get("target_layer_ids"), "target_layer_ids"),
            steps=int(raw.get("ttt_length") or eagle3.STEPS),
            d2t=None,
            required=(),
        )
    fields = {name: raw.get(name) for name in ("block_size", "target_layer_ids", "mask_token_id")}
    heads = files.heads_from(raw)
    if heads["markov_head_type"] == "none" and not heads["enable_confidence_head"]:
        algorithm = "dflash"
    shape = gemma4 if raw["architectures"][0].startswith("Gemma4") else qwen3
    config = shape.config_from(path, raw, fields | heads, target, algorithm=algorithm)
    return files.build(path, config, target, tensors, optional=(files.EMBED, files.LM_HEAD))
