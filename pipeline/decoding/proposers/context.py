"""A draft's own keys and values, in the pages that its target's are in.

A request's page table serves both, so a prompt that finds its pages finds the draft's context along with the target's,
where the page bears this draft's tag. Tags are told to the pool as a page's last position is committed.

Letters: N committed positions, C cells.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Many

import torch

from pipeline.decoding.attention import StepLayout
from pipeline.decoding.cache import PagedKV, Shape, on_device, page_bytes
from pipeline.decoding.geometry import LayerAttention
from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.proposers.drawing import Asked, Drawn, Room
from pipeline.decoding.recorded import SIZES, RecordingTerms, Replays, StepInput, size_for
from pipeline.decoding.request import Sequence
from pipeline.decoding.table_layout import Segment, TableLayout
from pipeline.drafts.base import Draft

_numbers = itertools.count()


@dataclasses.dataclass
class Extension:
    """Positions that a context grows by: rows of the taps given, absolute positions and cells (int64[N] on the draft's
    device), in the order of the commits."""

    rows: list[int]
    positions: torch.Tensor
    cells: torch.Tensor


class DraftContext:
    """Keys and values of a draft's layers, and how far they go for each request.

    Args:
        layers: attention of each of the draft's layers.
        tag: what a page that ends at a position of a request must have been made of, beside the tokens up to there.
    """

    def __init__(
        self,
        layers: Many[LayerAttention],
        dtype: torch.dtype,
        device: torch.device,
        tag: Callable[[Sequence, int], Hashable] = lambda _sequence, _end: None,
    ) -> None:
        self.layers, self.dtype, self.device = layers, dtype, device
        self._tag = tag
        self._cache: PagedKV | None = None
        self._pool: PagePool | None = None
        self._number = -1
        self._length: dict[Sequence, int] = {}

    @property
    def _shapes(self) -> list[Shape]:
        return [(a.kv_heads, a.key_dim, a.value_dim) for a in self.layers]

    def page_bytes(self, size: int) -> int:
        """What a page of `size` positions takes here."""
        return page_bytes(self._shapes, size, self.dtype)

    def attach(self, pool: PagePool) -> None:
        """Makes room for the pool's pages; what it held in another pool is gone.

        Raises DraftlineError: not enough memory.
        """
        if pool is self._pool:
            return
        if self._pool is not None:
            self.detach(self._pool)
        self._cache = PagedKV(self._shapes, pool.total, pool.size, self.dtype, self.device)
        # A new number each time: tensors made anew hold nothing of what pages were marked with before.
        self._pool, self._number = pool, next(_numbers)

    def detach(self, pool: PagePool) -> None:
        """Lets the memory go, if it is in this pool."""
        if pool is not self._pool:
            return
        pool.untag(self._number)
        self._cache, self._pool = None, None
        self._length.clear()

    @property
    def pool(self) -> PagePool | None:
        """The pool that it is attached to."""
        return self._pool

    @property
    def cache(self) -> PagedKV:
        """The tensors. Raises RuntimeError before `attach`."""
        if self._cache is None:
            raise RuntimeError("the draft is not attached to a pool of pages")
        return self._cache

    def tag(self, sequence: Sequence, end: int) -> Hashable:
        """What a page of the request must bear that ends at position `end`."""
        return (self._number, self._tag(sequence, end))

    def begin(self, sequence: Sequence) -> None:
        """A request starts with the context that its pages bring."""
        self._length[sequence] = sequence.computed

    def end(self, sequence: Sequence) -> None:
        """A request is gone."""
        self._length.pop(sequence, None)

    def length(self, sequence: Sequence) -> int:
        """Positions of context."""
        return self._length[sequence]

    def extend(self, commits: list[Commit], count: Callable[[Commit], int]) -> Extension | None:
        """Lengthens contexts by the first count(commit) positions of each; the caller writes them to the cells.

        Returns None where that is none. Raises RuntimeError for a commit that doesn't go on where its request's
        context ends.
        """
        size = self.cache.size
        rows: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        for c in commits:
            s = c.sequence
            if self._length[s] != c.start:
                raise RuntimeError(
                    f"draft context of request {s.request.id} ends at {self._length[s]}, commit is at {c.start}"
                )
            end = c.start + max(count(c), 0)
            rows += range(c.rows.start, c.rows.start + end - c.start)
            positions += range(c.start, end)
            cells += [s.pages[p // size] * size + p % size for p in range(c.start, end)]
            self._length[s] = end
            if self._pool is not None:
                for i in range(c.start // size, end // size):
                    self._pool.mark(s.pages[i], self.tag(s, (i + 1) * size))
        if not rows:
            return None
        return Extension(rows, on_device(positions, self.device), on_device(cells, self.device))


class WithContext(abc.ABC):
    """Of neural drafts: keys and values are in a `DraftContext`, and blocks may be recorded."""

    name: str
    draft: Draft
    device: torch.device
    context: DraftContext
    _replays: Replays[Drawn] | None = None

    def __init__(self) -> None:
        self._rooms: dict[Hashable, tuple[StepInput, Room]] = {}

    def page_bytes(self, size: int) -> int:
        return self.context.page_bytes(size)

    def attach(self, pool: PagePool, terms: RecordingTerms | None = None) -> None:
        before = self.context.pool
        self.context.attach(pool)
        if before is not pool:
            self._rooms.clear()  # recorded over tensors that are gone
            self._replays = None if terms is None else Replays(terms, f"the draft ({self.name})")

    def detach(self, pool: PagePool) -> None:
        if pool is self.context.pool:
            self._rooms.clear()
            self._replays = None
        self.context.detach(pool)

    @abc.abstractmethod
    def _draw(self, asked: Asked, layout: StepLayout | TableLayout) -> Drawn:
        """Draws the blocks of B requests over a layout; nothing in it may look at a value on the host."""

    def _proposal(self, asked: Asked, segments: list[Segment], *, causal: bool) -> Proposal:
        """Blocks of B requests whose next positions are these segments, from a recording where there is one.

        Args:
            asked: on the CPU but for its state.
        """
        drawn = self._replayed(asked, segments, causal)
        if drawn is None:
            layout = StepLayout(segments, self.context.cache, self.context.layers, causal=causal)
            drawn = self._draw(asked.on(self.device), layout)
        return drawn.proposal(len(segments), self.draft.d2t)

    def _replayed(self, asked: Asked, segments: list[Segment], causal: bool) -> Drawn | None:
        if self._replays is None or not self._replays.possible:
            self._rooms.clear()
            return None
        terms, each = self._replays.terms, segments[0].count
        batch = size_for(len(segments), [*(s for s in SIZES if s < terms.requests), terms.requests])
        if batch is None:
            return None
        key = (batch, *asked.kind)
        if not self._replays.may(key):
            return None
        if key not in self._rooms:
            self._rooms[key] = (StepInput(batch * each, batch, terms, self.device), Room(asked, batch, self.device))
        given, room = self._rooms[key]
        if not given.load(segments):
            return None
        room.fill(asked)

        def body() -> Drawn:
            return self._draw(room.asked, given.layout(self.context.cache, self.context.layers, causal=causal))

        return self._replays.run(key, body)

    def wipe(self, pages: list[int]) -> None:
        self.context.cache.wipe(pages)

    def tag(self, sequence: Sequence, end: int) -> Hashable:
        return self.context.tag(sequence, end)

    def admit(self, sequence: Sequence) -> None:
        self.context.begin(sequence)

    def release(self, sequence: Sequence) -> None:
        self.context.end(sequence)
