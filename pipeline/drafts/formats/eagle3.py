"""Eagle3 in the projects' checkpoints: one layer over [embedding ; hidden], with the tensors of Llama's layers, of
Qwen3's where queries and keys are normalised, or of Gemma 4's.

Letters: V target vocabulary rows, Vd draft vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.drafts.base import Draft
from pipeline.drafts.formats import files, gemma4, qwen3
from pipeline.drafts.formats.files import Obstacle
from pipeline.errors import ArtifactError
from pipeline.target import Target

STEPS = 7
"""Unrolled steps of a file that does not say how many: what EAGLE-3 and SpecForge train."""


def obstacles(draft: Draft) -> list[Obstacle]:
    """What of a draft no project's files hold."""
    if draft.config.layer_family != "llama":
        return [Obstacle(f"These files have Llama's layer; this draft's is {draft.config.layer_family}'s.")]
    if draft.embed_scale == 1.0 and not draft.logit_softcap:
        return []
    return [
        Obstacle(
            f"The target scales its embeddings by {draft.embed_scale:g} and caps its logits at {draft.logit_softcap}; "
            "Eagle3's layers in these files do neither."
        )
    ]


def taps_obstacle(draft: Draft, who: str, count: int) -> list[Obstacle]:
    """That a format or engine takes `count` tapped layers and no other number, if the draft has others."""
    ids = draft.config.target_layer_ids
    if len(ids) == count:
        return []
    last = max(ids)
    spread = [min(ids) + round(i * (last - min(ids)) / (count - 1)) for i in range(count)]
    wanted = f"[{','.join(map(str, spread))}]"
    return [
        Obstacle(
            f"{who} takes {count} tapped layers; this draft has {len(ids)} (target_layer_ids={ids}).",
            {"draft.target_layer_ids": wanted} if len(set(spread)) == count else {},
        )
    ]


def residual_obstacle(draft: Draft, who: str) -> list[Obstacle]:
    """That a format or engine starts the residual stream before the norm, if the draft starts it behind."""
    if not draft.config.norm_before_residual:
        return []
    return [
        Obstacle(
            f"{who} starts the residual stream at g itself; this draft at the normalised g.",
            {"draft.norm_before_residual": "false"},
        )
    ]


def settings_of(draft: Draft, target: Target) -> dict[str, Any]:
    """The fields of a Llama or Qwen3 config that describe the layer."""
    if draft.config.layer_family == "gemma4":
        return gemma4.settings_of(draft, target)
    fields = qwen3.settings_of(draft, target)
    if draft.config.qk_norm:
        return fields
    return {k: v for k, v in fields.items() if k not in ("layer_types", "use_sliding_window", "sliding_window")} | {
        "model_type": "llama",
        "mlp_bias": False,
    }


def tensors_of(draft: Draft, layer: str = "layers.0.") -> dict[str, torch.Tensor]:
    """The draft's weights by the projects' names, with its rows of lm_head [Vd, D].

    Args:
        layer: prefix of the layer's names.
    """
    own = {n.replace("layers.0.", layer, 1): t for n, t in files.tensors_of(draft).items()}
    return own | {files.LM_HEAD: draft.lm_rows}


def read(
    path: Path,
    layers: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    target: Target,
    *,
    layer_ids: list[int],
    steps: int,
    d2t: torch.Tensor | None,
    norm_before_residual: bool = False,
    layer: str = "layers.0.",
    required: tuple[str, ...] = (files.LM_HEAD,),
) -> Draft:
    """The draft of a checkpoint.

    Args:
        layers: the Llama or Qwen3 fields of config.json. layer_ids: as ours.
        steps: tokens of a block. d2t: int64[Vd], ascending target ids; None for the whole vocabulary.
        layer: prefix of the layer's names in `tensors`. required: matrices that must be there.
    Raises:
        ArtifactError: fields or tensors that don't fit the target; the message lists every difference.
    """
    kind = layers.get("model_type")
    if kind not in ("llama", "qwen3", *gemma4.KINDS):
        raise ArtifactError(f"{path} has a layer of model_type {kind!r}; this reads llama's, qwen3's and gemma4's.")
    if layers.get("mlp_bias"):
        raise ArtifactError(f"{path} has mlp_bias; this version's drafts have no biases.")
    fields = {
        "block_size": steps,
        "target_layer_ids": layer_ids,
        "mask_token_id": 0,
        "qk_norm": kind != "llama",
        "norm_before_residual": norm_before_residual,
        "draft_vocab_size": 0 if d2t is None else len(d2t),
        **files.heads_from({}),
    }
    if (count := layers.get("num_hidden_layers", 1)) != 1:
        raise ArtifactError(f"{path} has {count} layers; this version computes Eagle3 of one.")
    if kind in gemma4.KINDS:
        config = gemma4.config_from(path, layers, fields, target, algorithm="eagle3")
    else:
        config = qwen3.config_from(path, {"head_dim": _head_dim(layers), **layers}, fields, target, algorithm="eagle3")
    named = {"layers.0." + n.removeprefix(layer) if n.startswith(layer) else n: t for n, t in tensors.items()}
    return files.build(path, config, target, named, d2t=d2t, required=required, optional=(files.EMBED, files.LM_HEAD))


def _head_dim(layers: Mapping[str, Any]) -> int | None:
    """Llama's configs may leave it to hidden_size and heads."""
    hidden, heads = layers.get("hidden_size"), layers.get("num_attention_heads")
    return hidden // heads if hidden and heads else None
