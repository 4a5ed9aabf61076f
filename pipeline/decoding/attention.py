"""Ragged attention over pages, plugged into transformers' AttentionInterface.

A step flattens the new tokens of all requests into one row of T tokens. The model runs unmodified; its attention
layers call `ragged_attention`, which stores the new keys and values and lets every request attend to its own pages,
each layer by its own window, scale and softcap (pipeline/decoding/geometry.py). Drafts attend by the same layout.

Shapes: T tokens of the step, n new tokens of a request, H query heads, G = H / Hkv query heads per KV head, d head dim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.decoding.cache import PagedKV, on_device
from pipeline.decoding.geometry import LayerAttention, Probe
from pipeline.decoding.table_layout import Segment, TableLayout, by_table

NAME = "draftline_ragged"
ALONE = 128
"""Cells of a run that is attended to by itself: merging costs as much as copying about so many."""
FEW = 16
"""Most tokens of a request that attends with another (decoding, not reading a prompt)."""
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of the cells that a segment's tokens see in layers of one kind, and nobody else's.

    Attributes:
        runs: (first cell, count) of consecutive cells, N in all.
        mask: additive [G * n, N], or None where every token sees all of it.
    """

    runs: list[tuple[int, int]]
    mask: torch.Tensor | None

    def take(self, cells: torch.Tensor) -> torch.Tensor:
        """[1, Hkv, N, d] of cells [1, Hkv, C, d]: a view where it is one run, else a copy."""
        views = [cells.narrow(2, *run) for run in self.runs]
        return views[0] if len(views) == 1 else torch.cat(views, 2)


def _parts(s: Segment, size: int, shape: LayerAttention, causal: bool, q: torch.Tensor) -> list[_Part]:
    """What a segment sees from the first position that any of its tokens sees: a single part, or where parts can be
    merged, long runs before the segment each by itself and the rest together at the end."""
    window = shape.window
    begin, end = max(0, s.start - window + 1) if window else 0, s.start + s.count
    first = begin // size
    pages = np.asarray(s.pages[first : -(-end // size)])
    bounds = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
    apart: list[_Part] = []
    runs: list[tuple[int, int]] = []
    seen: list[torch.Tensor] = []
    merge = _merges(shape, q)
    for a, b in itertools.pairwise(bounds):
        low, high = max(begin, (first + a) * size), min(end, (first + b) * size)
        run = (int(pages[a]) * size + low - (first + a) * size, high - low)
        if merge and high <= s.start and high - low >= ALONE:
            apart.append(_Part([run], None))
        else:
            runs.append(run)
            seen.append(torch.arange(low, high, device=q.device))
    mask = None
    if s.count > 1 and (causal or (window and end > window)):
        mask = _additive(_visible(s, torch.cat(seen), s.count, window, causal), shape.groups, q.dtype)
    return [*apart, _Part(runs, mask)]


def _visible(s: Segment, at: torch.Tensor, rows: int, window: int, causal: bool) -> torch.Tensor:
    """bool[rows, N]: which of positions int64[N] each token of a segment sees; rows behind its last are as that one."""
    own = torch.arange(s.start, s.start + rows, device=at.device).clamp(max=s.start + s.count - 1)[:, None]
    near = at > own - (window or s.start + s.count)
    if causal:
        return (at <= own) & near
    return (at < s.start + s.count) & ((at >= s.start) | near)


def _additive(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[.., G * rows, N] of bool[.., rows, N]."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return mask.repeat(*[1] * (mask.dim() - 2), groups, 1)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two segments that see a run of cells each, as one: any two runs of a tensor are an equal distance apart.

    The shorter one's tokens read past its end and heed none of it, which is right as long as no cell there holds a
    value that is not finite: a mask doesn't keep a NaN out of a softmax. Pages are wiped of them (PagedKV.wipe), and a
    step that finds one nevertheless, as its neighbour may have written it in this very step, runs again without pairs
    (TargetRunner.step).

    Attributes:
        rows: which segments of the step. counts: their tokens, the most of which is n.
        first: cell where the first run begins. apart: cells from there to the second's. length: N, of the longer.
        mask: additive [2, 1, G * n, N], or None where every token sees all of it.
    """

    rows: tuple[int, int]
    counts: tuple[int, int]
    first: int
    apart: int
    length: int
    mask: torch.Tensor | None

    def attend(
        self, q: list[torch.Tensor], keys: torch.Tensor, values: torch.Tensor, shape: LayerAttention
    ) -> list[torch.Tensor]:
        """q, each [H, its n, d], over keys and values [Hkv, C, d] -> each [H, its n, d of v]."""
        most = max(self.counts)
        if self.counts[0] != self.counts[1]:
            q = [F.pad(x, (0, 0, 0, most - x.shape[1])) for x in q]
        folded = torch.stack(q).view(2, shape.kv_heads, -1, q[0].shape[2])
        out = _softmax(folded, self._both(keys), self._both(values), self.mask, shape)
        first, second = out.reshape(2, -1, most, shape.value_dim).unbind(0)
        return [first.narrow(1, 0, self.counts[0]), second.narrow(1, 0, self.counts[1])]

    def _both(self, cells: torch.Tensor) -> torch.Tensor:
        """[2, Hkv, N, d], a view."""
        heads, _, dim = cells.shape
        strides = (self.apart * dim, cells.stride(0), dim, 1)
        return cells.as_strided((2, heads, self.length, dim), strides, self.first * dim)


def _merges(shape: LayerAttention, q: torch.Tensor) -> bool:
    """Whether attention over parts can be merged: every token sees all of a part, and its sum of exponentials is to be
    had (from CPU's attention without softcap)."""
    return q.device.type == "cpu" and not shape.window and not shape.softcap and shape.key_dim == shape.value_dim


class StepLayout:
    """Where each of the T tokens of a step belongs: built once per step, used by every layer.

    Args:
        geometry: what each layer's attention asks for.
        causal: True: a token sees the positions up to its own. False: it sees the whole context and all tokens of its
            segment (a draft's block); a window then limits what it sees of the context only.
        pairs: whether two segments may attend in one call (on CPU), which reads cells that are not theirs.
    Attributes:
        positions, cells: int64[T].
    """

    def __init__(
        self,
        segments: list[Segment],
        cache: PagedKV,
        geometry: Sequence[LayerAttention],
        *,
        causal: bool = True,
        pairs: bool = True,
    ) -> None:
        self.cache, self.geometry = cache, geometry
        self._segments, self._causal, self._may_pair = segments, causal, pairs
        self._counts = [s.count for s in segments]
        self._seen: dict[tuple[int, int, bool], tuple[list[list[_Part]], list[_Pair]]] = {}
        self._table: torch.Tensor | None = None
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None
        size = cache.size
        positions: list[int] = []
        cells: list[int] = []
        for s in segments:
            for p in range(s.start, s.start + s.count):
                positions.append(p)
                cells.append(s.pages[p // size] * size + p % size)
        self.positions = on_device(positions, cache.device)
        self.cells = on_device(cells, cache.device)

    def behind(self) -> StepLayout:
        """Of as many tokens of each segment again, right behind these, in pages that it has already: what the device
        has of the page tables serves both."""
        moved = [dataclasses.replace(s, start=s.start + s.count) for s in self._segments]
        layout = StepLayout(moved, self.cache, self.geometry, causal=self._causal, pairs=self._may_pair)
        layout._table = self._table
        return layout

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of q [H, T, d] after storing k, v [Hkv, T, d] (unless another layer keeps them); returns
        [T, H, d of v].

        On CUDA a kernel reads the page tables. Elsewhere a request whose pages are consecutive attends to a view of
        them, two such requests in one call; one with several long runs of pages to each of them, merged by their sums
        of exponentials; what is left is copied together.
        """
        shape = self.geometry[layer]
        if shape.source == layer:
            self.cache.write(layer, self.cells, k, v)
        if q.device.type == "cuda":
            return self.by_kernel(shape, q)
        keys, values = self.cache.k[shape.source], self.cache.v[shape.source]
        kind = (shape.window, shape.groups, _merges(shape, q))
        parts, pairs = self._seen.get(kind) or self._lay_out(kind, shape, q)
        rows = q.split(self._counts, 1)
        out: dict[int, torch.Tensor] = {}
        for pair in pairs:
            out |= zip(pair.rows, pair.attend([rows[i] for i in pair.rows], keys, values, shape), strict=True)
        for i, mine in enumerate(rows):
            if i not in out:
                out[i] = _attend(mine, parts[i], keys[None], values[None], shape)
        mixed = out[0] if len(out) == 1 else torch.cat([out[i] for i in range(len(rows))], 1)
        return mixed.transpose(0, 1)

    @property
    def paired(self) -> bool:
        """Whether segments attended two by two in any layer so far."""
        return any(pairs for _, pairs in self._seen.values())

    def _lay_out(
        self, kind: tuple[int, int, bool], shape: LayerAttention, q: torch.Tensor
    ) -> tuple[list[list[_Part]], list[_Pair]]:
        """What the segments see in layers of a kind, and which of them attend two by two; once for all of the kind."""
        parts = [_parts(s, self.cache.size, shape, self._causal, q) for s in self._segments]
        made = self._seen[kind] = (parts, self._pairs(parts, shape, q) if self._may_pair else [])
        return made

    def _pairs(self, parts: list[list[_Part]], shape: LayerAttention, q: torch.Tensor) -> list[_Pair]:
        few = [
            i for i, s in enumerate(self._segments) if s.count <= FEW and len(parts[i]) == len(parts[i][0].runs) == 1
        ]
        run = {i: parts[i][0].runs[0] for i in few}
        # Whoever is alike wastes least on the other.
        few.sort(key=lambda i: (self._counts[i], run[i][1]))
        pairs: list[_Pair] = []
        while len(few) > 1:
            i, j = sorted(few[:2], key=lambda i: run[i][0])
            length = max(run[i][1], run[j][1])
            if abs(run[i][1] - run[j][1]) > ALONE or run[j][0] + length > self.cache.cells:
                few = few[1:]
                continue
            few = few[2:]
            two = (self._segments[i], self._segments[j])
            counts = (two[0].count, two[1].count)
            at = torch.arange(length, device=q.device)
            begins = [s.start + s.count - run[n][1] for n, s in zip((i, j), two, strict=True)]
            visible = torch.stack(
                [
                    _visible(s, at + begin, max(counts), shape.window, self._causal)
                    for s, begin in zip(two, begins, strict=True)
                ]
            )
            mask = None if bool(visible.all()) else _additive(visible[:, None], shape.groups, q.dtype)
            pairs.append(_Pair((i, j), counts, run[i][0], run[j][0] - run[i][0], length, mask))
        return pairs

    def by_kernel(self, shape: LayerAttention, q: torch.Tensor) -> torch.Tensor:
        """[T, H, d of v] of q [H, T, d] over keys and values that are in their cells, by the paged kernel (on CPU: by
        its reference)."""
        return by_table(q, self.cache, shape, self._on_device(q.device), self._causal)

    def _on_device(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Page tables int32[segments, most pages], first rows int32[segments + 1] and contexts int32[segments], made
        once."""
        if self._table is None:
            self._table = _page_table(self._segments).to(device, non_blocking=True)
        if self._bounds is None:
            starts = [0, *itertools.accumulate(self._counts)]
            context = [s.start for s in self._segments]
            self._bounds = (on_device(starts, device, torch.int32), on_device(context, device, torch.int32))
        return (self._table, *self._bounds)


def _page_table(segments: list[Segment]) -> torch.Tensor:
    """int32[segments, most pages]; what is behind a segment's last page is never read."""
    table = np.zeros((len(segments), max(len(s.pages) for s in segments)), dtype=np.int32)
    for row, s in zip(table, segments, strict=True):
        row[: len(s.pages)] = s.pages
    return torch.from_numpy(table)


def _attend(
    q: torch.Tensor, parts: list[_Part], keys: torch.Tensor, values: torch.Tensor, shape: LayerAttention
) -> torch.Tensor:
    """q [H, n, d] over parts of keys and values [1, Hkv, C, d] -> [H, n, d of v]."""
    heads, count, dim = q.shape
    k, v, mask = parts[0].take(keys), parts[0].take(values), parts[0].mask
    folded = q.reshape(1, shape.kv_heads, -1, dim)
    if len(parts) > 1:
        out, total = _FLASH(folded, k, v, attn_mask=mask, scale=shape.scale)
        out = out.float()
        for part in parts[1:]:
            more, sums = _FLASH(folded, part.take(keys), part.take(values), attn_mask=part.mask, scale=shape.scale)
            out = torch.lerp(out, more.float(), torch.sigmoid(sums - total)[..., None])
            total = torch.logaddexp(total, sums)
        out = out.to(q.dtype)
    elif count == 1 and not shape.softcap:
        # Heads apart: there are more of them than KV heads to spread over threads.
        out = F.scaled_dot_product_attention(q[None], k, v, scale=shape.scale, enable_gqa=True)
    else:
        out = _softmax(folded, k, v, mask, shape)
    return out.reshape(heads, count, shape.value_dim)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, shape: LayerAttention
) -> torch.Tensor:
    """q [b, Hkv, G * n, d], k and v [b, Hkv, N, d], mask to be added to the scores -> [b, Hkv, G * n, d of v]."""
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
    draftline_layout: StepLayout | TableLayout | Probe | None = None,
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
