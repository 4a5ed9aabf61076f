"""Positions that became part of a text, kept for the draft until it is asked for that text again.

A draft's context grows by a few rows a step, and reading its weights for them costs a plain step some hundredths. Held
back and handed over together, they cost a fraction of that, and only those are handed over whose request is drafted
for, as the first part of drafting. A request that ends meanwhile takes its own along: on a machine that is full each
row costs, and it has no use for them.
"""

from __future__ import annotations

import dataclasses

import torch

from pipeline.decoding.cache import on_device
from pipeline.decoding.proposers.base import Commit, Proposer
from pipeline.decoding.request import Sequence

ROWS_EACH = 256
"""Rows of a text that are kept before they are handed over anyway: they bound what the next draft for it waits for. A
short chat fits whole, so that on a full machine, where drafting does not pay, it costs nothing."""
MOST_BYTES = 256 * 2**20
"""Of taps kept of all texts, however many rows these are. Those of a step are kept while any text of it is: beyond
that, the texts that hold the older half of the steps are handed over."""


@dataclasses.dataclass(eq=False)
class _Step:
    """A step's taps (float[T, L*D], the rows that are held), and how many of its commits are held yet."""

    number: int
    taps: torch.Tensor | None
    held: int


class HeldCommits:
    """Commits with the taps of their steps, of each request in the order in which they were made."""

    def __init__(self) -> None:
        self._commits: dict[Sequence, list[tuple[_Step, Commit]]] = {}
        self._steps = self._bytes = 0

    def take(
        self,
        chunks: list[Commit],
        blocks: list[Commit],
        taps: torch.Tensor | None,
        proposer: Proposer,
        *,
        hold: bool,
        shown: bool,
    ) -> None:
        """What became part of texts in a step: chunks of prompts, and blocks.

        Args:
            hold: whether it may be told later; a proposer without taps always knows at once, as it costs nothing.
            shown: whether others may look for the pages of prompts, which bear the draft's tag only when it has been
                told.
        """
        if not hold or not proposer.layer_ids:
            self.tell([*chunks, *blocks], taps, proposer)
            return
        if shown:
            self.tell(chunks, taps, proposer)
        self.add(blocks if shown else [*chunks, *blocks], taps, proposer)

    def add(self, commits: list[Commit], taps: torch.Tensor | None, proposer: Proposer) -> None:
        """Keeps a step's commits (taps [T, L*D]); hands over those of texts of which too many rows are kept."""
        if not commits:
            return
        commits, taps = _chosen(commits, taps)
        self._steps += 1
        step = _Step(self._steps, taps, len(commits))
        self._bytes += _bytes(step)
        for c in commits:
            self._commits.setdefault(c.sequence, []).append((step, c))
        if self._bytes >= MOST_BYTES:
            half = (min(held[0][0].number for held in self._commits.values()) + self._steps) // 2
            self.hand_over(proposer, [s for s, held in self._commits.items() if held[0][0].number <= half])
        elif full := [c.sequence for c in commits if self.rows(c.sequence) >= ROWS_EACH]:
            self.hand_over(proposer, full)

    def tell(self, commits: list[Commit], taps: torch.Tensor | None, proposer: Proposer) -> None:
        """Commits at once, but for requests of which something is held: theirs are kept behind that."""
        later = [c for c in commits if c.sequence in self._commits]
        if now := [c for c in commits if c.sequence not in self._commits]:
            proposer.commit(now, taps)
        if later:
            self.add(later, taps, proposer)

    def first(self, sequence: Sequence) -> int | None:
        """The first position of a request that is held; None: the draft knows all."""
        held = self._commits.get(sequence)
        return held[0][1].start if held else None

    def rows(self, sequence: Sequence) -> int:
        """How many rows of a request are held."""
        held = self._commits.get(sequence)
        return held[-1][1].start + _rows(held[-1][1]) - held[0][1].start if held else 0

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request that is released."""
        self._take(sequence)

    def hand_over(self, proposer: Proposer, sequences: list[Sequence] | None = None) -> int:
        """Commits what is kept of these requests (None: of all), in one call; returns how many rows it was."""
        wanted: dict[_Step, list[Commit]] = {}
        for s in list(self._commits) if sequences is None else sequences:
            for step, c in self._take(s):
                wanted.setdefault(step, []).append(c)
        if not wanted:
            return 0
        commits: list[Commit] = []
        rows: list[torch.Tensor] = []
        offset = 0
        for step in sorted(wanted, key=lambda step: step.number):
            mine, taps = _chosen(sorted(wanted[step], key=lambda c: c.rows.start), step.taps)
            commits += [_moved(c, c.rows.start + offset) for c in mine]
            if taps is not None:
                rows.append(taps)
                offset += taps.shape[0]
        proposer.commit(commits, (rows[0] if len(rows) == 1 else torch.cat(rows)) if rows else None)
        return sum(map(_rows, commits))

    def _take(self, sequence: Sequence) -> list[tuple[_Step, Commit]]:
        """Takes a request's commits out."""
        taken = self._commits.pop(sequence, [])
        for step, _ in taken:
            step.held -= 1
            if step.held == 0:
                self._bytes -= _bytes(step)
        return taken


def _chosen(commits: list[Commit], taps: torch.Tensor | None) -> tuple[list[Commit], torch.Tensor | None]:
    """Commits of a step with the rows of its taps that are theirs, a copy where it has others too."""
    if taps is None or sum(map(_rows, commits)) == taps.shape[0]:
        return commits, taps
    index: list[int] = []
    moved: list[Commit] = []
    for c in commits:
        moved.append(_moved(c, len(index)))
        index += range(c.rows.start, c.rows.stop)
    return moved, taps[on_device(index, taps.device)]


def _moved(commit: Commit, start: int) -> Commit:
    return dataclasses.replace(commit, rows=slice(start, start + _rows(commit)))


def _rows(commit: Commit) -> int:
    return commit.rows.stop - commit.rows.start


def _bytes(step: _Step) -> int:
    return 0 if step.taps is None else step.taps.numel() * step.taps.element_size()
