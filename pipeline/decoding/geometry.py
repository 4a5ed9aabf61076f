"""What each layer's attention asks of the engine, found by running the model once.

Configs name windows, scales and head dims differently in every family; the calls that a model's layers make to
transformers' AttentionInterface don't. One forward over two tokens records them, and what the engine can't do is
refused there with the reason, before anything of the target is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DraftlineError
from pipeline.target import Target

_PROBED = (7, 7)
_HEEDED = ("sliding_window", "softcap")
# What models pass along that means nothing to attention over our own cache and mask.
_HARMLESS = ("cache_position", "dropout", "is_causal", "logits_to_keep", "past_key_values", "position_ids", "use_cache")


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """One layer's attention.

    Attributes:
        heads, kv_heads: H and Hkv. key_dim, value_dim: dims of a key (and query) and of a value.
        scale: factor on q k^T. window: how many positions a query sees, its own included; 0 for all.
        softcap: c in c * tanh(scores / c), or 0.0.
        source: layer whose keys and values it attends to: itself, or an earlier one that shares them.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    source: int

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


class Probe:
    """Takes the place of a step's layout and records what each layer asks for."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.layers: dict[int, LayerAttention] = {}
        self._keys: dict[int, Tensor] = {}

    def record(
        self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Notes a call with q [1, H, T, d], k and v [1, Hkv, T, d]; returns zeros [1, T, H, d of v]."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        tokens = q.shape[2]
        unknown = sorted(n for n, value in options.items() if n not in _HEEDED + _HARMLESS and _says_something(value))
        if index in self.layers:
            raise refused(self.target, f"layer {index} attends more than once")
        if getattr(module, "is_causal", True) is False or options.get("is_causal") is False:
            raise refused(self.target, f"layer {index} attends in both directions")
        if k.shape[2] != tokens or v.shape[2] != tokens:
            raise refused(
                self.target, f"layer {index} attends to {k.shape[2]} keys of its own making for {tokens} tokens"
            )
        window, softcap = options.get("sliding_window") or 0, options.get("softcap") or 0.0
        if unknown:
            raise refused(
                self.target, f"layer {index}'s attention takes {', '.join(unknown)}, which the engine's doesn't"
            )
        source = next((i for i, key in self._keys.items() if key is k), index)
        if source == index:
            self._keys[index] = k
        self.layers[index] = LayerAttention(
            q.shape[1], k.shape[1], k.shape[3], v.shape[3], float(scale), int(window), float(softcap), source
        )
        return v.new_zeros(1, tokens, q.shape[1], v.shape[3])


def attention_geometry(target: Target, implementation: str) -> list[LayerAttention]:
    """What each decoder layer's attention asks for, in order.

    Args:
        implementation: name of the engine's attention function. The target is left switched to it.
    Raises:
        DraftlineError: the engine can't run this target; says why. The target is left as it was.
    """
    family = target.family
    if family.engine_obstacle is not None:
        raise refused(target, family.engine_obstacle)
    if getattr(target.model, "_is_stateful", False):
        raise refused(target, "its layers keep a running state, which can't be taken back when drafts are rejected")
    _check_rope(target)
    backbone: Any = family.backbone
    before = backbone.config._attn_implementation
    try:
        backbone.set_attn_implementation(implementation)
        probe = Probe(target)
        ids = torch.tensor([_PROBED], device=target.device) % target.vocab_size
        with torch.inference_mode():
            family.hidden(ids, draftline_layout=probe)
        silent = [i for i in range(len(family.layers)) if i not in probe.layers]
        if silent:
            kind = type(family.layers[silent[0]]).__name__
            raise refused(target, f"layer {silent[0]} ({kind}) does not attend through AttentionInterface")
    except Exception:
        backbone.set_attn_implementation(before)
        raise
    return [probe.layers[i] for i in range(len(family.layers))]


def _check_rope(target: Target) -> None:
    parameters = getattr(target.config, "rope_parameters", None) or {}
    for part in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            raise refused(
                target,
                f"its rotary embedding ({part['rope_type']}) follows the longest sequence of a step, so a request's "
                "text would depend on the others",
            )


def refused(target: Target, why: str) -> DraftlineError:
    """The error of a target that the engine can't run."""
    return DraftlineError(
        f"The decoding engine can't run this target ({target.family.name}): {why}. Features, training and drafts of it "
        "work; decode it with another engine (export.version=trained)."
    )


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0)
