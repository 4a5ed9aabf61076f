"""Positions that became part of a text while nothing was drafted, kept for the draft until it is asked again.

A draft's context grows by a few rows a step, and reading its weights for them costs a plain step some hundredths. Held
back and handed over together, they cost a fraction of that; a request that ends meanwhile takes its own along.
"""

from __future__ import annotations

import dataclasses

import torch

from pipeline.decoding.proposers.base import Commit, Proposer
from pipeline.decoding.request import Sequence

MOST_ROWS = 128
"""Rows of taps kept before they are handed over anyway: it bounds their memory, and what the next draft waits for."""


class HeldCommits:
    """Commits in the order in which they were made, with the taps of their steps."""

    def __init__(self) -> None:
        self._steps: list[tuple[list[Commit], torch.Tensor | None]] = []

    def add(self, commits: list[Commit], taps: torch.Tensor | None, proposer: Proposer) -> None:
        """Keeps a step's commits (taps [T, L*D]); hands all over where they have become many."""
        if commits:
            self._steps.append((commits, taps))
        if sum(c.rows.stop - c.rows.start for held, _ in self._steps for c in held) >= MOST_ROWS:
            self.hand_over(proposer)

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request that is released."""
        steps = [([c for c in held if c.sequence is not sequence], taps) for held, taps in self._steps]
        self._steps = [(held, taps) for held, taps in steps if held]

    def hand_over(self, proposer: Proposer) -> None:
        """Commits everything kept, in one call."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        commits: list[Commit] = []
        rows: list[torch.Tensor] = []
        offset = 0
        for held, taps in steps:
            commits += [dataclasses.replace(c, rows=slice(c.rows.start + offset, c.rows.stop + offset)) for c in held]
            if taps is not None:
                rows.append(taps)
                offset += taps.shape[0]
        proposer.commit(commits, torch.cat(rows) if rows else None)
