"""Steps recorded once and replayed: on a GPU, launching a step operation by operation takes longer than a step over a
few tokens itself, and a CUDA graph launches all of it at once.

A graph computes over the addresses that it was recorded with. So what a step reads lies in tensors that stay
(`StepInput`), is filled before each replay, in one copy, and everything else is worked out from it on the device:
positions, cells, whose token is whose. Nothing in a recorded step looks at a value on the host.

A recorded step has a size; a smaller one leaves places free. They go to one more request, nobody's, whose pages are all
the scratch page: what is written there is never read by others.

Letters: T tokens of a step, R requests it has room for (nobody's is the last, the R + 1st), P pages of a table's row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from pipeline.decoding.cache import PagedKV
from pipeline.decoding.geometry import LayerAttention
from pipeline.decoding.table_layout import Segment, TableLayout

log = logging.getLogger(__name__)

Out = TypeVar("Out")
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Of recorded target steps, in tokens; step costs are measured at the same ones, which records them before any request
comes."""
WARM_UPS = 2
"""Runs before a step is recorded: kernels are compiled and libraries take their workspaces, which a graph can't do."""


@dataclasses.dataclass(frozen=True)
class Recorded(Generic[Out]):
    """out: the tensors that a step left, written anew by every replay. replay: does the step again, over whatever its
    input holds by then."""

    out: Out
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records what a function does on the device."""

    def __call__(self, body: Callable[[], Out]) -> Recorded[Out]: ...


class CudaGraphs:
    """Records CUDA graphs, which share their working memory, as one runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], Out]) -> Recorded[Out]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = body()
        return Recorded(out, graph.replay)


@dataclasses.dataclass(frozen=True)
class Recording:
    """What an engine gives its target and drafts to record their steps with.

    Attributes:
        record: how. scratch: the page that places left free write to; it is no request's.
        pages: P, most pages of a request. requests: most requests of a step.
    """

    record: Recorder
    scratch: int
    pages: int
    requests: int


class StepInput:
    """What a recorded step of `tokens` tokens reads: whose they are and where, int32, at addresses that stay.

    Attributes:
        ids: int32[T] token ids, 0 behind the step's. starts: int32[R + 2] first rows. context: int32[R + 1] positions
            before them. table: int32[R + 1, P].
    """

    def __init__(self, tokens: int, requests: int, recording: Recording, device: torch.device) -> None:
        self.tokens, self.requests = tokens, requests
        sizes = [tokens, requests + 2, requests + 1, (requests + 1) * recording.pages]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.ids, self.starts, self.context, table = self._device.split(sizes)
        self.table = table.view(requests + 1, -1)
        self._ids, self._starts, self._context, host_table = (part.numpy() for part in self._host.split(sizes))
        self._table = host_table.reshape(requests + 1, -1)
        self._table[-1] = recording.scratch

    def load(self, segments: Sequence[Segment], ids: Sequence[int] = ()) -> bool:
        """Fills in a step, in one copy that nobody waits for; False where it has more than T tokens or R segments, or a
        segment more than P pages."""
        counts = np.fromiter((s.count for s in segments), dtype=np.int32, count=len(segments))
        total = int(counts.sum())
        if total > self.tokens or len(segments) > self.requests:
            return False
        if any(len(s.pages) > self._table.shape[1] for s in segments):
            return False
        self._ids[: len(ids)] = ids
        self._ids[len(ids) :] = 0
        self._starts[1 : len(segments) + 1] = counts.cumsum()
        self._starts[len(segments) + 1 : -1] = total
        self._starts[-1] = self.tokens
        self._context[:] = 0
        for row, s in enumerate(segments):
            self._context[row] = s.start
            self._table[row, : len(s.pages)] = s.pages
        self._device.copy_(self._host, non_blocking=True)
        return True

    def layout(self, cache: PagedKV, geometry: Sequence[LayerAttention], *, causal: bool) -> TableLayout:
        """The layout of whatever step is filled in, worked out on the device."""
        row = torch.arange(self.tokens, dtype=torch.int32, device=self.starts.device)
        owner = torch.searchsorted(self.starts, row, right=True) - 1
        positions = (self.context[owner] + row - self.starts[owner]).long()
        return TableLayout(
            cache, geometry, self.table, self.starts, self.context, positions, owner=owner, causal=causal
        )


class Replays(Generic[Out]):
    """Recorded steps by size (and whatever else tells them apart), recorded when first asked for.

    Args:
        what: whose steps they are, for the log.
    """

    def __init__(self, recording: Recording, what: str) -> None:
        self.recording, self._what = recording, what
        self._recorded: dict[Hashable, Recorded[Any]] = {}
        self.possible = True

    def run(self, key: Hashable, body: Callable[[], Out]) -> Out | None:
        """Does a step whose input is filled in; None where steps can't be recorded, which is said once.

        What it returns is overwritten by the next step of the same key.
        """
        if not self.possible:
            return None
        if key not in self._recorded:
            try:
                self._recorded[key] = self.recording.record(body)
            except RuntimeError as e:
                self.possible = False
                self._recorded.clear()
                log.warning(
                    "The steps of %s can't be recorded in CUDA graphs and are launched operation by operation, which "
                    "is slower where few requests run: %s. engine.cuda_graphs=false says so from the start.",
                    self._what,
                    e,
                )
                return None
        recorded = self._recorded[key]
        recorded.replay()
        out: Out = recorded.out
        return out


def size_for(count: int, sizes: Sequence[int]) -> int | None:
    """The least of rising sizes that holds `count`; None where none does."""
    return next((s for s in sizes if s >= count), None)
