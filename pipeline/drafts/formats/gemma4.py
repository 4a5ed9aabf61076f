"""The Gemma 4 shape of a draft's layers in a config.json: all of them with full attention, as the target's own
full-attention layers are built, so that heads are `global_head_dim` wide.

Letters: V target vocabulary rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.formats.files import CONFIG, Obstacle, checked
from pipeline.errors import ArtifactError
from pipeline.target import Target

KINDS = ("gemma4_text", "gemma4_unified_text")
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
    "head_dim": "global_head_dim",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}
_FIXED = {
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
_ROPE = {"proportional": True, "default": False}


def obstacles(draft: Draft) -> list[Obstacle]:
    """What of a draft with Gemma 4's layers the shape can't hold."""
    usual = draft.config.hidden_size**0.5
    if abs(draft.embed_scale / usual - 1) < 0.01:
        return []
    return [
        Obstacle(
            f"Gemma 4's drafts scale embeddings by the root of their size, {usual:.4g}; this target's scale is "
            f"{draft.embed_scale:g}.",
            {"draft.layer_family": "llama"},
        )
    ]


def settings_of(draft: Draft, target: Target) -> dict[str, Any]:
    """The fields of a Gemma 4 text config (as transformers reads them) that describe a draft's layers."""
    c, own = draft.config, target.config
    kinds = list(own.layer_types)
    # Of sliding layers, which the draft has none of: what the target's say.
    sliding = own.per_layer_config[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0]
    rope = {"rope_type": "proportional", "rope_theta": c.rope_theta, "partial_rotary_factor": c.rope_fraction or 1.0}
    return {
        "model_type": own.model_type,
        "target_text_model_type": own.model_type,
        **{theirs: getattr(c, ours) for ours, theirs in _FIELDS.items()},
        **_FIXED,
        "attention_k_eq_v": bool(c.values_are_keys),
        "num_global_key_value_heads": c.num_kv_heads,
        "num_key_value_heads": sliding.num_key_value_heads if c.values_are_keys else c.num_kv_heads,
        "head_dim": sliding.head_dim,
        "attention_dropout": 0.0,
        "rope_parameters": {**own.rope_parameters, "full_attention": rope},
        "vocab_size": draft.embed.shape[0],
        "pad_token_id": own.pad_token_id,
        "final_logit_softcapping": draft.logit_softcap,
        "max_position_embeddings": int(own.max_position_embeddings),
        "layer_types": ["full_attention"] * c.num_layers,
        "sliding_window": own.sliding_window,
        "tie_word_embeddings": False,
    }


def config_from(
    path: Path, layers: Mapping[str, Any], fields: Mapping[str, Any], target: Target, *, algorithm: str
) -> DraftConfig:
    """The draft's config (see `qwen3.config_from`).

    Raises:
        ArtifactError: fields that are missing, that this version does not compute, or that don't fit the target; the
            message lists every one.
    """
    rope = (layers.get("rope_parameters") or {}).get("full_attention") or {}
    shared = bool(layers.get("attention_k_eq_v"))
    heads = "num_global_key_value_heads" if shared else "num_key_value_heads"
    missing = [theirs for theirs in (*_FIELDS.values(), heads) if layers.get(theirs) is None]
    missing += [] if rope.get("rope_theta") else ["rope_parameters.full_attention.rope_theta"]
    missing += [name for name, value in fields.items() if value is None]
    if missing:
        raise ArtifactError(f"{path / CONFIG} has no {', '.join(missing)}.")
    problems = [
        f"{name} is {layers[name]!r}, this version computes {value!r}"
        for name, value in _FIXED.items()
        if layers.get(name, value) != value
    ]
    kind, fraction = rope.get("rope_type", "default"), float(rope.get("partial_rotary_factor", 1.0))
    if kind not in _ROPE or (fraction != 1.0 and not _ROPE[kind]) or rope.get("factor", 1.0) != 1.0:
        problems.append(
            f"rope_parameters.full_attention is {rope}, this version computes 'proportional' without factor"
        )
    if any(k != "full_attention" for k in layers.get("layer_types") or []):
        problems.append(f"layer_types is {layers['layer_types']}, this version computes full attention in these files")
    mine: dict[str, float | None] = {
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "final_logit_softcapping": target.family.logit_softcap,
    }
    for name, value in mine.items():
        if (theirs := layers.get(name, value)) != value:
            problems.append(f"{name} is {theirs}, the target's is {value}")
    usual = target.hidden_size**0.5
    if abs(target.family.embed_scale / usual - 1) >= 0.01:
        problems.append(f"these drafts scale embeddings by {usual:.4g}, the target by {target.family.embed_scale:g}")
    config = DraftConfig(
        algorithm=algorithm,
        layer_family="gemma4",
        **{ours: layers[theirs] for ours, theirs in _FIELDS.items()},
        num_kv_heads=int(layers[heads]),
        rope_theta=float(rope["rope_theta"]),
        rope_fraction=fraction,
        values_are_keys=shared,
        **{"qk_norm": True, **fields},
    )
    return checked(path, config, target, problems)
