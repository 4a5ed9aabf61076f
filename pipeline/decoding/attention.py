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


@dataclasses.dataclass(frozen=True)
class _View:
    """What a segment's tokens see in layers of one window.

    Nothing but the request's own cells is read, so that what others left in theirs never matters.

    Attributes:
        low, length: of the cells of the N positions, where its pages are consecutive. cells: int64[N], where not.
        mask: additive [G * n, N], or None where every token sees all of it.
    """

    low: int
    length: int
    cells: torch.Tensor | None
    mask: torch.Tensor | None

    @classmethod
    def of(
        cls, s: Segment, size: int, window: int, groups: int, causal: bool, dtype: torch.dtype, device: torch.device
    ) -> _View:
        """The positions from the first that any token of the segment sees to its last."""
        begin, end = max(0, s.start - window + 1) if window else 0, s.start + s.count
        first = begin // size
        pages = np.asarray(s.pages[first : -(-end // size)])
        skip, length = begin - first * size, end - begin
        cells = None
        if (np.diff(pages) != 1).any():
            grid = pages[:, None] * size + np.arange(size)
            cells = torch.from_numpy(grid.ravel()[skip : skip + length]).to(device)
        mask = None
        if s.count > 1 and (causal or (window and end > window)):
            own = torch.arange(s.start, end, device=device)[:, None]
            at = torch.arange(begin, end, device=device)
            seen = at <= own if causal else at >= s.start
            if window:
                near = at > own - window
                seen = seen & near if causal else seen | near
            mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(~seen, float("-inf")).repeat(groups, 1)
        return cls(int(pages[0]) * size + skip, length, cells, mask)

    def take(self, cells: torch.Tensor) -> torch.Tensor:
        """[1, Hkv, N, d] of cells [1, Hkv, C, d]: a view where the pages are consecutive, else a copy."""
        return cells.narrow(2, self.low, self.length) if self.cells is None else cells.index_select(2, self.cells)


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
        self._segments, self._causal = segments, causal
        self._counts = [s.count for s in segments]
        self._views: dict[tuple[int, int], list[_View]] = {}
        size = cache.size
        positions: list[int] = []
        cells: list[int] = []
        for s in segments:
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
        heads, _, dim = q.shape
        keys, values = self.cache.k[shape.source][None], self.cache.v[shape.source][None]
        out = []
        for view, mine in zip(self._seen(shape, q.dtype), q.split(self._counts, 1), strict=True):
            k, v = view.take(keys), view.take(values)
            if mine.shape[1] == 1 and not shape.softcap:
                # Heads apart: there are more of them than KV heads to spread over threads.
                mixed = F.scaled_dot_product_attention(mine[None], k, v, scale=shape.scale, enable_gqa=True)
            else:
                mixed = _attend(mine.reshape(1, shape.kv_heads, -1, dim), k, v, view.mask, shape)
            out.append(mixed.reshape(heads, -1, shape.value_dim))
        return (out[0] if len(out) == 1 else torch.cat(out, 1)).transpose(0, 1)

    def _seen(self, shape: LayerAttention, dtype: torch.dtype) -> list[_View]:
        """What each segment sees in such a layer; made once for all layers alike."""
        key = (shape.window, shape.groups)
        if key not in self._views:
            size, device = self.cache.size, self.cache.device
            self._views[key] = [
                _View.of(s, size, shape.window, shape.groups, self._causal, dtype, device) for s in self._segments
            ]
        return self._views[key]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, shape: LayerAttention
) -> torch.Tensor:
    """q [1, Hkv, G * n, d], k and v [1, Hkv, N, d], mask [G * n, N] -> [1, Hkv, G * n, d of v]."""
    if not shape.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale)
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
