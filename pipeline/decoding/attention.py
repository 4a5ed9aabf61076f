"""Ragged attention over pages, plugged into transformers' AttentionInterface.

A step flattens the new tokens of all requests into one row of T tokens. The model runs unmodified; its attention
layers call `ragged_attention`, which stores the new keys and values and lets every request attend to its own pages,
each layer by its own window, scale and softcap (pipeline/decoding/geometry.py). Drafts attend by the same layout.

Shapes: T tokens of the step, n new tokens of a request, H query heads, G = H / Hkv query heads per KV head, d head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.decoding.cache import PagedKV
from pipeline.decoding.geometry import LayerAttention, Probe

NAME = "draftline_ragged"


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` consecutive new tokens of one request, the first at absolute position `start`; `pages`: its table."""

    pages: list[int]
    start: int
    count: int


class _Span:
    """A segment in the step: its rows, the cells it sees, and the masks, all made once for the layers alike.

    Nothing but the request's own cells is read, so that what others left in theirs never matters.
    """

    def __init__(self, segment: Segment, first: int, size: int, causal: bool, device: torch.device) -> None:
        self.rows = slice(first, first + segment.count)
        self.start, self.count = segment.start, segment.count
        self.end = segment.start + segment.count
        self._pages, self._size, self._causal, self._device = segment.pages, size, causal, device
        self._cells: dict[int, slice | torch.Tensor] = {}
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def _begin(self, window: int) -> int:
        """The first position that any token here sees."""
        return max(0, self.start - window + 1) if window else 0

    def cells(self, window: int) -> slice | torch.Tensor:
        """Those of positions _begin..end: a slice where its pages are consecutive, else int64[end - begin]."""
        begin = self._begin(window)
        if begin not in self._cells:
            first = begin // self._size
            pages = np.asarray(self._pages[first : -(-self.end // self._size)])
            skip, length = begin - first * self._size, self.end - begin
            if (np.diff(pages) == 1).all():
                low = int(pages[0]) * self._size + skip
                self._cells[begin] = slice(low, low + length)
            else:
                grid = pages[:, None] * self._size + np.arange(self._size)
                self._cells[begin] = torch.from_numpy(grid.ravel()[skip : skip + length]).to(self._device)
        return self._cells[begin]

    def mask(self, window: int, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [G * n, end - begin], or None where every token sees all of it."""
        key = (window, groups)
        if key not in self._masks:
            if self.count == 1 or (not self._causal and (not window or self.end <= window)):
                self._masks[key] = None
            else:
                own = torch.arange(self.start, self.end, device=self._device)[:, None]
                at = torch.arange(self._begin(window), self.end, device=self._device)
                seen = at <= own if self._causal else at >= self.start
                if window:
                    near = at > own - window
                    seen = seen & near if self._causal else seen | near
                mask = torch.zeros(seen.shape, dtype=dtype, device=self._device)
                self._masks[key] = mask.masked_fill_(~seen, float("-inf")).repeat(groups, 1)
        return self._masks[key]


class StepLayout:
    """Where each of the T tokens of a step belongs: built once per step, used by every layer.

    Args:
        geometry: what each layer's attention asks for.
        causal: True: a token sees the positions up to its own. False: it sees the whole context and all tokens of its
            segment (a draft's block); a window then limits what it sees of the context only.
    Attributes:
        positions, cells: int64[T].
    """

    def __init__(
        self, segments: list[Segment], cache: PagedKV, geometry: Sequence[LayerAttention], *, causal: bool = True
    ) -> None:
        self.cache, self.geometry = cache, geometry
        size = cache.size
        positions: list[int] = []
        cells: list[int] = []
        self._spans: list[_Span] = []
        for s in segments:
            self._spans.append(_Span(s, len(positions), size, causal, cache.device))
            for p in range(s.start, s.start + s.count):
                positions.append(p)
                cells.append(s.pages[p // size] * size + p % size)
        self.positions = torch.tensor(positions, device=cache.device)
        self.cells = torch.tensor(cells, device=cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of q [H, T, d] after storing k, v [Hkv, T, d] (unless another layer keeps them); returns
        [T, H, d of v].

        A request whose pages are consecutive attends to a view of them, another to a copy of its own cells.
        """
        shape = self.geometry[layer]
        if shape.source == layer:
            self.cache.write(layer, self.cells, k, v)
        # The one place where attention over pages is done: a kernel that takes page tables goes here.
        heads, tokens, dim = q.shape
        out = q.new_empty(heads, tokens, shape.value_dim)
        keys, values = self.cache.k[shape.source], self.cache.v[shape.source]
        for span in self._spans:
            cells = span.cells(shape.window)
            if isinstance(cells, slice):
                mine, its = keys[:, cells], values[:, cells]
            else:
                mine, its = keys.index_select(1, cells), values.index_select(1, cells)
            folded = q[:, span.rows].reshape(shape.kv_heads, -1, dim)
            mask = span.mask(shape.window, shape.groups, q.dtype)
            out[:, span.rows] = _attend(folded, mine, its, mask, shape).view(heads, span.count, shape.value_dim)
        return out.transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, shape: LayerAttention
) -> torch.Tensor:
    """q [Hkv, G * n, d], k and v [Hkv, N, d], mask [G * n, N] -> [Hkv, G * n, d of v]."""
    if not shape.softcap:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=shape.scale)[0]
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (shape.scale / shape.softcap)) * shape.softcap
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(-1).to(q.dtype) @ v


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
