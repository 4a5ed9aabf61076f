"""Attention over page tables that lie on the device, by the paged kernel.

Shapes: T tokens of the step, R requests, P pages of a table's row, H query heads, Hkv KV heads, d head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from draftline_kernels import ragged_paged_attention
from pipeline.decoding.cache import PagedKV
from pipeline.decoding.geometry import LayerAttention


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` consecutive new tokens of one request, the first at absolute position `start`; `pages`: its table."""

    pages: list[int]
    start: int
    count: int


class TableLayout:
    """Whose tokens a step's are and where, told by tensors on the device alone: what a recorded step attends by
    (pipeline/decoding/recorded.py). As StepLayout, but always through the paged kernel.

    Args:
        table: int32[R, P] pages. starts: int32[R + 1] first rows. context: int32[R] positions before them.
        positions: int64[T]. owner: int64[T], the row of the table of each token.
    Attributes:
        positions, cells: int64[T].
    """

    def __init__(
        self,
        cache: PagedKV,
        geometry: Sequence[LayerAttention],
        table: torch.Tensor,
        starts: torch.Tensor,
        context: torch.Tensor,
        positions: torch.Tensor,
        *,
        owner: torch.Tensor,
        causal: bool,
    ) -> None:
        self.cache, self.geometry, self.positions = cache, geometry, positions
        self._table, self._starts, self._context, self._owner, self._causal = table, starts, context, owner, causal
        # Nobody's tokens may lie behind the last page: any page of theirs will do.
        page = table[owner, (positions // cache.size).clamp(max=table.shape[1] - 1)]
        self.cells = page.long() * cache.size + positions % cache.size

    def behind(self) -> TableLayout:
        """Of as many tokens of each request again, right behind these."""
        counts = self._starts.diff()
        return TableLayout(
            self.cache,
            self.geometry,
            self._table,
            self._starts,
            self._context + counts,
            self.positions + counts[self._owner],
            owner=self._owner,
            causal=self._causal,
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As StepLayout.attend."""
        shape = self.geometry[layer]
        if shape.source == layer:
            self.cache.write(layer, self.cells, k, v)
        return by_table(q, self.cache, shape, (self._table, self._starts, self._context), self._causal, few=True)


def by_table(
    q: torch.Tensor,
    cache: PagedKV,
    shape: LayerAttention,
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    causal: bool,
    *,
    few: bool = False,
) -> torch.Tensor:
    """[T, H, d of v] of q [H, T, d] by the paged kernel; `where`: page tables, first rows, contexts; `few`: most of
    these requests may have no tokens."""
    return ragged_paged_attention(
        q.transpose(0, 1),
        cache.k[shape.source],
        cache.v[shape.source],
        *where,
        page_size=cache.size,
        scale=shape.scale,
        window=shape.window,
        softcap=shape.softcap,
        causal=causal,
        few=few,
    )
