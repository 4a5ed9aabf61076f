"""Ragged attention over slot caches, plugged into transformers' AttentionInterface.

A step flattens the new tokens of all requests into one row of T tokens. The model runs unmodified; its attention
layers call `ragged_attention`, which stores the new keys and values and lets every request attend to its own cache,
each layer by its own window, scale and softcap (pipeline/decoding/geometry.py).

Shapes: T tokens of the step, H query heads, G = H / Hkv query heads per KV head, n cached positions, d head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.decoding.cache import LayeredKVCache
from pipeline.decoding.geometry import LayerAttention, Probe

NAME = "draftline_ragged"


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` consecutive new tokens of the request in `slot`, the first at absolute position `start`."""

    slot: int
    start: int
    count: int


@dataclasses.dataclass
class _Group:
    """Requests that attend in one call, of slots low to high: `rows` are their tokens in the step, `cells` their
    places in a padded [slots, longest] grid (None: one request, nothing padded).

    last: int64[slots, longest], the absolute position of each cell. first: the smallest of a real one. end: one past
    the largest.
    """

    low: int
    high: int
    longest: int
    first: int
    end: int
    rows: torch.Tensor
    cells: torch.Tensor | None
    last: torch.Tensor
    masks: dict[tuple[int, int], torch.Tensor | None] = dataclasses.field(default_factory=dict)

    def begin(self, window: int) -> int:
        """The first position that any token here sees."""
        return max(0, self.first - window + 1) if window else 0

    def mask(self, window: int, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [slots, 1, groups * longest, end - begin], or None where every token sees all of it; made once for
        all layers alike."""
        key = (window, groups)
        if key not in self.masks:
            if self.cells is None and self.longest == 1:
                self.masks[key] = None
            else:
                at = torch.arange(self.begin(window), self.end, device=self.last.device)
                seen = at <= self.last[..., None]
                if window:
                    seen &= at > self.last[..., None] - window
                    # Cells without a token stand at position 0; one that sees nothing has a softmax of 0/0.
                    seen[..., 0] |= ~seen.any(-1)
                self.masks[key] = _additive(seen, dtype).repeat(1, groups, 1)[:, None]
        return self.masks[key]


class StepLayout:
    """Where each of the T tokens of a step belongs: built once per step, used by every layer.

    Requests with few new tokens (decoding) attend together over the slots they span; a long run of tokens
    (prefill) attends by itself.

    Args:
        geometry: what each layer's attention asks for.
    """

    def __init__(
        self,
        segments: list[Segment],
        cache: LayeredKVCache,
        geometry: Sequence[LayerAttention],
        *,
        together_below: int = 17,
    ) -> None:
        self.cache, self.geometry = cache, geometry
        self.segments = segments
        device = cache.device
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
        self._groups = [self._single(i) for i in alone]
        if together:
            self._groups.append(self._joint(together))

    def _single(self, i: int) -> _Group:
        s = self.segments[i]
        rows = torch.arange(self.starts[i], self.starts[i + 1], device=self.cache.device)
        return _Group(s.slot, s.slot + 1, s.count, s.start, s.start + s.count, rows, None, self.positions[rows][None])

    def _joint(self, members: list[int]) -> _Group:
        segments = [self.segments[i] for i in members]
        device = self.cache.device
        low = min(s.slot for s in segments)
        high = max(s.slot for s in segments) + 1
        longest = max(s.count for s in segments)
        last = torch.zeros(high - low, longest, dtype=torch.int64, device=device)
        rows: list[int] = []
        cells: list[int] = []
        for i, s in zip(members, segments, strict=True):
            last[s.slot - low, : s.count] = torch.arange(s.start, s.start + s.count, device=device)
            rows += range(self.starts[i], self.starts[i + 1])
            cells += [(s.slot - low) * longest + j for j in range(s.count)]
        return _Group(
            low,
            high,
            longest,
            min(s.start for s in segments),
            max(s.start + s.count for s in segments),
            torch.tensor(rows, device=device),
            torch.tensor(cells, device=device),
            last,
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of q [H, T, d] after storing k, v [Hkv, T, d] (unless another layer keeps them); returns
        [T, H, d of v]."""
        shape = self.geometry[layer]
        if shape.source == layer:
            self.cache.write(layer, self.slots, self.positions, k.transpose(0, 1), v.transpose(0, 1))
        heads, tokens, dim = q.shape
        if len(self._groups) == 1 and self._groups[0].cells is None:
            out = self._scores(self._groups[0], shape, q.reshape(1, shape.kv_heads, -1, dim))
            return out.view(heads, tokens, shape.value_dim).transpose(0, 1)
        out = q.new_empty(tokens, heads, shape.value_dim)
        by_token = q.transpose(0, 1)
        for g in self._groups:
            batch = g.high - g.low
            if g.cells is None:
                padded = by_token[g.rows][None]
            else:
                padded = q.new_zeros(batch * g.longest, heads, dim)
                padded[g.cells] = by_token[g.rows]
                padded = padded.view(batch, g.longest, heads, dim)
            folded = padded.transpose(1, 2).reshape(batch, shape.kv_heads, -1, dim)
            result = self._scores(g, shape, folded).view(batch, heads, g.longest, shape.value_dim)
            result = result.transpose(1, 2).reshape(-1, heads, shape.value_dim)
            out[g.rows] = result if g.cells is None else result[g.cells]
        return out

    def _scores(self, g: _Group, shape: LayerAttention, q: torch.Tensor) -> torch.Tensor:
        """Attention of q [slots, Hkv, groups * longest, d] over the slots' caches: [slots, Hkv, .., d of v]."""
        here = slice(g.begin(shape.window), g.end)
        keys = self.cache.k[shape.source][g.low : g.high, :, here]
        values = self.cache.v[shape.source][g.low : g.high, :, here]
        mask = g.mask(shape.window, shape.groups, q.dtype)
        if not shape.softcap:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=shape.scale)
        scores = torch.tanh((q @ keys.transpose(-1, -2)) * (shape.scale / shape.softcap)) * shape.softcap
        if mask is not None:
            scores = scores + mask
        return scores.float().softmax(-1).to(q.dtype) @ values


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    draftline_layout: StepLayout | Probe | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d]."""
    if draftline_layout is None:
        raise RuntimeError("this model runs through the decoding engine; its layout was not passed")
    if isinstance(draftline_layout, Probe):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return draftline_layout.record(module, query, key, value, scale, options), None
    return draftline_layout.attend(int(module.layer_idx), query[0], key[0], value[0])[None], None  # type: ignore[arg-type]


AttentionInterface.register(NAME, ragged_attention)
