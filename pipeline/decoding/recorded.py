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
"""Of recorded steps, in tokens of a target's or requests of a draft's; step costs are measured at the same ones."""
_ALIGNED = 4
"""int32s: Triton compiles a kernel anew where a pointer is a multiple of 16 bytes in one call and not in another."""


@dataclasses.dataclass(frozen=True)
class Recorded(Generic[Out]):
    """out: the tensors that a step left, written anew by every replay. replay: does the step again, over whatever its
    input holds by then."""

    out: Out
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records what functions do on the device. What one of its recordings left may be overwritten by a replay of any
    other of them, as they share working memory; never by another recorder's."""

    def __call__(self, body: Callable[[], Out]) -> Recorded[Out]: ...


class CudaGraphs:
    """Records CUDA graphs of a device. Meanwhile any thread that makes the host wait for a GPU fails: torch's watch
    over that (set_sync_debug_mode) is of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        # One, as libraries keep a workspace for each that they ever ran on.
        self._aside = torch.cuda.Stream(device)

    def __call__(self, body: Callable[[], Out]) -> Recorded[Out]:
        with torch.cuda.device(self._device):
            return self._recorded(body)

    def _recorded(self, body: Callable[[], Out]) -> Recorded[Out]:
        before, watched = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self._aside.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._aside):
                # Kernels are compiled and libraries take their workspaces here, which a graph can't hold.
                body()
                # A capture that fails leaves the process the worse for it: most of what would fail is refused here.
                torch.cuda.set_sync_debug_mode("error")
                body()
            torch.cuda.set_sync_debug_mode(watched)
            # Other threads go on allocating: that is no fault of this one's.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._aside, capture_error_mode="thread_local"):
                out = body()
        finally:
            torch.cuda.set_sync_debug_mode(watched)
            torch.cuda.set_stream(before)
            before.wait_stream(self._aside)
        return Recorded(out, graph.replay)


@dataclasses.dataclass
class RecordingTerms:
    """How an engine's target and drafts record their steps.

    Attributes:
        recorder: makes one for each of them, as what a draft left is read after the target's replay.
        scratch: the page that places left free write to; it is no request's.
        pages: P, most pages of a request. requests: most requests of a step.
        made: how many recordings were made; a step in which one was made took longer than it will.
    """

    recorder: Callable[[], Recorder]
    scratch: int
    pages: int
    requests: int
    made: int = 0


class Mirror:
    """Numbers on the host, and the same at an address on the device that stays: filled in here, and sent in one copy.

    Attributes:
        host, device: zeros to begin with, of one shape and dtype.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(*shape, dtype=dtype, pin_memory=on_gpu)
        self.device = torch.zeros(*shape, dtype=dtype, device=device)
        self._sent = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Before `host` is written: the last copy was done long ago, unless somebody asks twice without reading."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Asks for a copy that nobody waits for."""
        self.device.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class StepInput:
    """What a recorded step of `tokens` tokens reads: whose they are and where, int32, at addresses that stay.

    Attributes:
        ids: int32[T] token ids, 0 behind the step's. starts: int32[R + 2] first rows. context: int32[R + 1] positions
            before them. anchors: int32[R + 1] last tokens, of steps that run ahead. table: int32[R + 1, P].
    """

    def __init__(self, tokens: int, requests: int, terms: RecordingTerms, device: torch.device) -> None:
        self.tokens, self.requests = tokens, requests
        wanted = [tokens, requests + 2, requests + 1, requests + 1, (requests + 1) * terms.pages]
        sizes = [-(-n // _ALIGNED) * _ALIGNED for n in wanted]
        self._mirror = Mirror([sum(sizes)], torch.int32, device)
        there = (part[:n] for part, n in zip(self._mirror.device.split(sizes), wanted, strict=True))
        self.ids, self.starts, self.context, self.anchors, table = there
        self.table = table.view(requests + 1, -1)
        here = (part[:n].numpy() for part, n in zip(self._mirror.host.split(sizes), wanted, strict=True))
        self._ids, self._starts, self._context, self._anchors, host_table = here
        self._table = host_table.reshape(requests + 1, -1)
        self._table[-1] = terms.scratch

    def load(self, segments: Sequence[Segment], ids: Sequence[int] = (), anchors: Sequence[int] = ()) -> bool:
        """Fills in a step, in one copy that nobody waits for; False where it has more than T tokens or R segments, or a
        segment more than P pages."""
        counts = np.fromiter((s.count for s in segments), dtype=np.int32, count=len(segments))
        total = int(counts.sum())
        if total > self.tokens or len(segments) > self.requests:
            return False
        if any(len(s.pages) > self._table.shape[1] for s in segments):
            return False
        self._mirror.wait()
        self._ids[: len(ids)] = ids
        self._ids[len(ids) :] = 0
        self._anchors[: len(anchors)] = anchors
        self._starts[1 : len(segments) + 1] = counts.cumsum()
        self._starts[len(segments) + 1 : -1] = total
        self._starts[-1] = self.tokens
        self._context[:] = 0
        for row, s in enumerate(segments):
            self._context[row] = s.start
            self._table[row, : len(s.pages)] = s.pages
        self._mirror.send()
        return True

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whose each token is, int64[T], and its place among that request's, int32[T]; worked out on the device."""
        row = torch.arange(self.tokens, dtype=torch.int32, device=self.starts.device)
        owner = torch.searchsorted(self.starts, row, right=True) - 1
        return owner, row - self.starts[owner]

    def layout(self, cache: PagedKV, geometry: Sequence[LayerAttention], *, causal: bool) -> TableLayout:
        """The layout of whatever step is filled in, worked out on the device."""
        owner, place = self.places()
        positions = (self.context[owner] + place).long()
        return TableLayout(
            cache, geometry, self.table, self.starts, self.context, positions, owner=owner, causal=causal
        )


class AheadInput:
    """What a recorded step reads whose blocks and lengths the host doesn't know: those lie on the device already, and
    ids and first rows are worked out there too.

    Args:
        block: K, most draft tokens of a request.
    """

    def __init__(self, tokens: int, requests: int, block: int, terms: RecordingTerms, device: torch.device) -> None:
        self.step = StepInput(tokens, requests, terms, device)
        self._lengths = torch.zeros(requests, dtype=torch.int64, device=device)
        self._drafts = torch.zeros(requests, block, dtype=torch.int64, device=device)

    def load(
        self, segments: Sequence[Segment], anchors: Sequence[int], drafts: torch.Tensor, lengths: torch.Tensor
    ) -> bool:
        """Fills in a step.

        Args:
            segments: of B requests, with no tokens yet. anchors: their last tokens. lengths: int64[B], 1 less than
                their tokens. drafts: int64[<= B, K], of the first ones.
        Returns:
            whether there is room for it.
        """
        if not self.step.load(segments, anchors=anchors):
            return False
        self._lengths.fill_(-1)  # nobody there, not even an anchor
        self._lengths[: len(lengths)].copy_(lengths, non_blocking=True)
        self._drafts[: len(drafts)].copy_(drafts, non_blocking=True)
        return True

    def layout(self, cache: PagedKV, geometry: Sequence[LayerAttention], *, causal: bool) -> TableLayout:
        """As StepInput.layout, which it fills in the rest for."""
        step, block = self.step, self._drafts.shape[1]
        step.starts[1:-1].copy_((self._lengths + 1).cumsum(0))
        owner, place = step.places()
        slot = place - 1
        drafted = self._drafts[owner.clamp(max=step.requests - 1), slot.clamp(0, block - 1).long()]
        ids = torch.where(slot < 0, step.anchors[owner].long(), drafted)
        step.ids.copy_(ids.masked_fill(owner == step.requests, 0))
        return step.layout(cache, geometry, causal=causal)


class Replays(Generic[Out]):
    """Recorded steps by size (and whatever else tells them apart), recorded when first asked for.

    Args:
        terms: how and within what they are recorded.
        what: whose steps they are, and otherwise: what happens where they can't be recorded; for the log.
    Attributes:
        possible: false once a step turned out to hold what can't be recorded.
    """

    def __init__(
        self,
        terms: RecordingTerms,
        what: str,
        otherwise: str = "they are launched operation by operation, which is slower where few requests run; "
        "engine.cuda_graphs=false says so from the start",
    ) -> None:
        self.terms, self._what, self._otherwise = terms, what, otherwise
        self._told = False  # that some can't be recorded
        self._record = terms.recorder()
        self._recorded: dict[Hashable, Recorded[Any]] = {}
        self._refused: set[Hashable] = set()
        self.possible = True

    def clear(self) -> None:
        """Forgets all: what they recorded has changed."""
        self._recorded.clear()
        self._refused.clear()
        self._told = False
        # The memory of graphs that are gone is not taken up again.
        self._record = self.terms.recorder()

    def may(self, key: Hashable) -> bool:
        """Whether a step could be run, as far as is known."""
        return self.possible and key not in self._refused

    def run(self, key: Hashable, body: Callable[[], Out]) -> Out | None:
        """Does a step whose input is filled in; None where it can't be recorded, which is said once of some and of all.

        What it returns is overwritten by the next run of whatever key.
        """
        if not self.may(key):
            return None
        if key not in self._recorded:
            self.terms.made += 1
            try:
                self._recorded[key] = self._record(body)
            except RuntimeError as e:
                if isinstance(e, torch.OutOfMemoryError):
                    self._refused.add(key)
                else:
                    self.possible = False
                    self._recorded.clear()
                if not self._told or not self.possible:
                    which = "Some steps" if self.possible else "The steps"
                    log.warning(
                        "%s of %s can't be recorded in CUDA graphs (%s): %s.", which, self._what, e, self._otherwise
                    )
                self._told = True
                return None
        recorded = self._recorded[key]
        recorded.replay()
        out: Out = recorded.out
        return out


def size_for(count: int, sizes: Sequence[int]) -> int | None:
    """The least of rising sizes that holds `count`; None where none does."""
    return next((s for s in sizes if s >= count), None)
