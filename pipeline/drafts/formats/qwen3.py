"""The Qwen3 shape (and Llama's) of a draft's layers in a config.json.

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

_FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}
_FIXED = {"attention_bias": False, "hidden_act": "silu"}


def obstacles(draft: Draft, project: str) -> list[Obstacle]:
    """What of a draft the Qwen3 shape can't hold, in the files of any of the projects."""
    c, found = draft.config, []
    if c.layer_family != "llama":
        why = f"{project}'s files have Qwen3-shaped layers; this draft's are {c.layer_family}'s, which DeepSpec's hold."
        return [Obstacle(why)]
    if not c.qk_norm:
        found.append(
            Obstacle(
                f"{project}'s Qwen3-shaped drafts have QK norm; this one has none.",
                {"draft.qk_norm": "true", "trainer.warm_start.layers": "target"},
            )
        )
    if draft.embed_scale != 1.0 or draft.logit_softcap:
        found.append(
            Obstacle(
                f"The target scales its embeddings by {draft.embed_scale:g} and caps its logits at "
                f"{draft.logit_softcap}; the Qwen3 shape does neither. Drafts of Gemma 4 with "
                "draft.layer_family=gemma4 fit DeepSpec's files."
            )
        )
    if len(windows := {w for w in c.sliding_windows if w}) > 1:
        widest = max(windows)
        found.append(
            Obstacle(
                f"The format has one window for all sliding layers; the draft has sliding_windows={c.sliding_windows}.",
                {"draft.sliding_windows": f"[{','.join(str(widest if w else 0) for w in c.sliding_windows)}]"},
            )
        )
    return found


def settings_of(draft: Draft, target: Target) -> dict[str, Any]:
    """The fields of a Qwen3 config (as transformers reads them) that describe a draft's layers."""
    c = draft.config
    window = max(c.sliding_windows, default=0)
    return {
        "model_type": "qwen3",
        **{theirs: getattr(c, ours) for ours, theirs in _FIELDS.items()},
        **_FIXED,
        # Engines on transformers 4 read the first, those on 5 the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "vocab_size": draft.embed.shape[0],
        "max_position_embeddings": int(target.config.max_position_embeddings),
        "layer_types": ["sliding_attention" if c.window(i) else "full_attention" for i in range(c.num_layers)],
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "tie_word_embeddings": False,
    }


def config_from(
    path: Path, layers: Mapping[str, Any], fields: Mapping[str, Any], target: Target, *, algorithm: str
) -> DraftConfig:
    """The draft's config.

    Args:
        layers: the Qwen3 fields of config.json, wherever the format keeps them.
        fields: our other fields with the file's values; None where the file has none, which is an error.
    Raises:
        ArtifactError: fields that are missing, that this version does not compute, or that don't fit the target; the
            message lists every one.
    """
    rope = layers.get("rope_parameters") or layers.get("rope_scaling") or {}
    theta = layers.get("rope_theta") or rope.get("rope_theta")
    missing = [theirs for theirs in _FIELDS.values() if layers.get(theirs) is None]
    missing += ["rope_theta"] if theta is None else []
    missing += [name for name, value in fields.items() if value is None]
    if missing:
        raise ArtifactError(f"{path / CONFIG} has no {', '.join(missing)}.")
    problems = [
        f"{name} is {layers[name]!r}, this version computes {value!r}"
        for name, value in _FIXED.items()
        if layers.get(name, value) != value
    ]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type is {kind!r}, this version computes 'default'")
    for name, mine in (("vocab_size", target.vocab_size), ("num_target_layers", target.num_layers)):
        if (theirs := layers.get(name, mine)) != mine:
            problems.append(f"{name} is {theirs}, the target's is {mine}")
    types = layers.get("layer_types") or []
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        problems.append(f"layer_types has {', '.join(map(repr, unknown))}, this version computes full and sliding")
    windows = [int(layers.get("sliding_window") or 0) if kind == "sliding_attention" else 0 for kind in types]
    if any(kind == "sliding_attention" and not w for kind, w in zip(types, windows, strict=True)):
        problems.append("layer_types has sliding_attention, but there is no sliding_window")
    config = DraftConfig(
        algorithm=algorithm,
        **{ours: layers[theirs] for ours, theirs in _FIELDS.items()},
        rope_theta=float(theta),  # type: ignore[arg-type]
        sliding_windows=windows if any(windows) else [],
        **{"qk_norm": True, **fields},
    )
    return checked(path, config, target, problems)
