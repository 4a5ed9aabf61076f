"""Ragged attention over slot caches, plugged into transformers' AttentionInterface.

A step flattens the new tokens of all requests into one row of T tokens. The model runs unmodified; its attention
layers call `ragged_attention`, which stores the new keys and values and lets every request attend to its own cache.

Shapes: T tokens of the step, H query heads, G = H / Hkv query heads per KV head, n cached positions, d head dim.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.decoding.cache import KVCache

NAME = "draftline_ragged"


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` consecutive new tokens of the request in `slot`, the first at absolute position `start`."""

    slot: int
    start: int
    count: int


@dataclasses.dataclass
class _Group:
    """Requests that attend in one call: `rows` places their tokens in a padded [slots, t] grid."""

    low: int
    high: int
    longest: int
    end: int
    rows: torch.Tensor | None
    cells: torch.Tensor | None
    mask: torch.Tensor | None


class StepLayout:
    """Where each of the T tokens of a step belongs: built once per step, used by every layer.

    Requests with few new tokens (decoding) attend together over the slots they span; a long run of tokens
    (prefill) attends by itself.
    """

    def __init__(self, segments: list[Segment], cache: KVCache, groups: int, *, together_below: int = 17) -> None:
        device = cache.k.device
        self.cache = cache
        self.segments = segments
        positions: list[int] = []
        slots: list[int] = []
        for s in segments:
            positions += range(s.start, s.start + s.count)
            slots += [s.slot] * s.count
        self.positions = torch.tensor(positions, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.starts = [0]
        for s in segments:
            self.starts.append(self.starts[-1] + s.count)
        together = [i for i, s in enumerate(segments) if s.count < together_below]
        if len(together) < 2:
            together = []
        alone = [i for i in range(len(segments)) if i not in set(together)]
        dtype = cache.k.dtype
        self._groups = [self._single(i, groups, dtype, device) for i in alone]
        if together:
            self._groups.append(self._joint(together, groups, dtype, device))

    def _single(self, i: int, groups: int, dtype: torch.dtype, device: torch.device) -> _Group:
        s = self.segments[i]
        end = s.start + s.count
        mask = None
        if s.count > 1:
            seen = torch.arange(end, device=device) <= torch.arange(s.start, end, device=device)[:, None]
            mask = _additive(seen, dtype).repeat(groups, 1)[None, None]
        rows = torch.arange(self.starts[i], self.starts[i + 1], device=device)
        return _Group(s.slot, s.slot + 1, s.count, end, rows, None, mask)

    def _joint(self, members: list[int], groups: int, dtype: torch.dtype, device: torch.device) -> _Group:
        segments = [self.segments[i] for i in members]
        low = min(s.slot for s in segments)
        high = max(s.slot for s in segments) + 1
        longest = max(s.count for s in segments)
        end = max(s.start + s.count for s in segments)
        # A slot between two members that has no token here still needs one visible position, or its softmax is 0/0.
        last = torch.zeros(high - low, longest, dtype=torch.int64, device=device)
        rows: list[int] = []
        cells: list[int] = []
        for i, s in zip(members, segments, strict=True):
            last[s.slot - low, : s.count] = torch.arange(s.start, s.start + s.count, device=device)
            rows += range(self.starts[i], self.starts[i + 1])
            cells += [(s.slot - low) * longest + j for j in range(s.count)]
        mask = _additive(torch.arange(end, device=device) <= last[..., None], dtype)
        return _Group(
            low,
            high,
            longest,
            end,
            torch.tensor(rows, device=device),
            torch.tensor(cells, device=device),
            mask.repeat(1, groups, 1)[:, None],
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of q [H, T, d] after storing k, v [Hkv, T, d]; returns [T, H, d]."""
        self.cache.write(layer, self.slots, self.positions, k.transpose(0, 1), v.transpose(0, 1))
        heads, tokens, dim = q.shape
        kv_heads = k.shape[0]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        if len(self._groups) == 1 and self._groups[0].cells is None:
            g = self._groups[0]
            folded = q.reshape(1, kv_heads, -1, dim)
            out = F.scaled_dot_product_attention(
                folded,
                keys[g.low : g.high, :, : g.end],
                values[g.low : g.high, :, : g.end],
                attn_mask=g.mask,
                scale=scale,
            )
            return out.view(heads, tokens, dim).transpose(0, 1)
        out = q.new_empty(tokens, heads, dim)
        by_token = q.transpose(0, 1)
        for g in self._groups:
            batch = g.high - g.low
            if g.cells is None:
                padded = by_token[g.rows][None]
            else:
                padded = q.new_zeros(batch * g.longest, heads, dim)
                padded[g.cells] = by_token[g.rows]
                padded = padded.view(batch, g.longest, heads, dim)
            folded = padded.transpose(1, 2).reshape(batch, kv_heads, -1, dim)
            result = F.scaled_dot_product_attention(
                folded,
                keys[g.low : g.high, :, : g.end],
                values[g.low : g.high, :, : g.end],
                attn_mask=g.mask,
                scale=scale,
            )
            result = result.view(batch, heads, g.longest, dim).transpose(1, 2).reshape(-1, heads, dim)
            out[g.rows] = result if g.cells is None else result[g.cells]
        return out


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    draftline_layout: StepLayout | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d]."""
    if draftline_layout is None:
        raise RuntimeError("this model runs through the decoding engine; its layout was not passed")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = draftline_layout.attend(int(module.layer_idx), query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return out[None], None


AttentionInterface.register(NAME, ragged_attention)
