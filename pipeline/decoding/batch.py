"""Who waits, who runs, and how the pages go round: requests come, get pages, give them up for older ones, and leave.

The oldest request that runs always keeps its pages, so that there is always progress; the youngest gives its own up
where they are too few, and is computed again when its turn comes. Nothing that it emitted is lost.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterator

from pipeline.config import EngineConfig
from pipeline.decoding.cache import PagedKV
from pipeline.decoding.held import HeldCommits
from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers.base import Proposer
from pipeline.decoding.request import RequestRefused, Sequence
from pipeline.decoding.tables import PageTables

log = logging.getLogger(__name__)

FEW = 4
"""Requests up to which the draft is told of a text that ends while it isn't asked. What that costs there is reading the
draft's weights once a text, against reading a turn's pages again; with more of them running, each row costs, and where
nothing is drafted the next turn is hardly drafted for either. What a last round drafted is held too, so that a text
which is drafted for among more of them may have its last page read again."""


class QueueFull(RequestRefused):
    """The engine's queue is at its bound; the client should retry later (HTTP 429)."""


class Batch:
    """The requests of an engine.

    Args:
        pool, cache: the target's pages. config: most requests that run, most that wait, whether whole pages are kept.
        proposer: has pages in the same pool.
        held: what the proposer has yet to be told; a request that leaves its pages is taken out of it.
    Attributes:
        proposer: whose contexts those to come will have; to be changed while no request runs.
        waiting: next first. running: those that have pages, oldest first.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PagedKV,
        config: EngineConfig,
        proposer: Proposer,
        held: HeldCommits,
    ) -> None:
        self.proposer = proposer
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self._most, self._most_waiting = config.max_requests, config.max_queue
        self._tables = PageTables(pool, keep=config.prefix_cache)
        self._cache = cache
        self._held = held
        self._ids: set[str] = set()

    def __iter__(self) -> Iterator[Sequence]:
        """All, those that wait first; what is iterated over may leave meanwhile."""
        return iter([*self.waiting, *self.running])

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer, as far as the pages go."""
        return self._tables.most_tokens(self.proposer.block_size)

    def enqueue(self, s: Sequence) -> None:
        """Puts a new request last.

        Raises:
            RequestRefused: another with its id is not finished, or it would not fit the pages were it alone.
            QueueFull: `config.max_queue` requests are waiting.
        """
        request = s.request
        if request.id in self._ids:
            raise RequestRefused("another request with this id is not finished.", request.id)
        self._tables.check(request, self.proposer.block_size)
        if len(self.waiting) >= self._most_waiting:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting, the most allowed (engine.max_queue={self._most_waiting}). "
                "Try again later.",
                request.id,
            )
        self._ids.add(request.id)
        self.waiting.append(s)

    def admit(self) -> None:
        """Lets waiting requests run, in order, as far as places and pages go.

        One whose prompt begins as one that is being read waits until those pages can be found, and so do those behind
        it: of several choices of a prompt the first reads it and the others find it. What they lose by that is a step
        at most, as the tokens of prompts that a step reads are the first one's first.
        """
        while self.waiting and len(self.running) < self._most:
            s = self.waiting[0]
            if not self._tables.admit(s, self.proposer.tag, self.running):
                return
            self.waiting.popleft()
            if not s.admitted:
                s.admitted = time.perf_counter()
                s.metrics.queue_seconds = s.admitted - s.submitted
                s.metrics.cached_prompt = s.computed
            self.proposer.admit(s)
            self.running.append(s)
            # One that comes back goes before those that came after it.
            self.running.sort(key=lambda s: s.submitted)

    def reserve(self) -> Sequence | None:
        """Pages for the next step's blocks, the oldest request first; the youngest give theirs up where they lack.

        Returns:
            a request that has become too long for the pages even alone, with its `failure` set: it is to be taken out.
        """
        for s in list(self.running):
            # Where it may be drafted for, the block's slots lie behind the anchor.
            wanted = s.computed + 1 + (self.proposer.block_size if s.draft_limit > 0 else 0)
            while s in self.running and s.prefilled and not self._tables.reserve(s, wanted):
                youngest = self.running[-1]
                if youngest is self.running[0]:  # a draft came whose blocks are longer than when it was submitted
                    s.failure = f"its {len(s.tokens)} tokens and a block behind them no longer fit the KV pages."
                    return s
                self.preempt(youngest)
        return None

    def preempt(self, s: Sequence) -> None:
        """Puts a running request back, to be computed again from its tokens; what it emitted stays."""
        log.info("Request %s gives its pages up after %d tokens", s.request.id, len(s.output))
        self._let_go(s, sound=False)
        s.metrics.preempted += 1
        self.waiting.appendleft(s)

    def settle(self, s: Sequence) -> None:
        """After a step whose logits were finite: returns what its rejected tokens held; whole pages may be found."""
        self._tables.settle(s)

    def remove(self, s: Sequence, *, sound: bool) -> None:
        """Takes a request out. sound: the logits of all that it computed were finite.

        Where few run, the draft is told of what was held back of it, so that its last pages bear the draft's tag and a
        conversation that goes on finds them.
        """
        self._ids.discard(s.request.id)
        if s in self.waiting:
            self.waiting.remove(s)
        else:
            drafted_for = s.request.max_draft != 0  # else its next turn hardly is either, and takes pages of any draft
            if sound and drafted_for and len(self.running) <= FEW and self._tables.shows(s, self._held.first(s)):
                self._held.hand_over(self.proposer, [s])
            self._let_go(s, sound=sound)

    def _let_go(self, s: Sequence, *, sound: bool) -> None:
        if not sound:
            pages = s.pages[s.listed :]
            self._cache.wipe(pages)
            self.proposer.wipe(pages)
        self._held.drop(s)
        self.proposer.release(s)
        self._tables.release(s)
        self.running.remove(s)
