"""Prompt lookup: proposes what followed the longest suffix of the text that occurred before (algorithms.md 8)."""

from __future__ import annotations

import torch

from pipeline.decoding.proposers.base import Commit, Proposal, WithoutContext
from pipeline.decoding.request import Sequence


class _Index:
    """Latest continuation of every n-gram of one text, extended token by token."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.indexed = 0
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Indexes n-grams that end before the last token, so that each has a continuation."""
        for end in range(max(self.indexed, 1), len(tokens)):
            for n in range(1, min(self.longest, end) + 1):
                self.after[tuple(tokens[end - n : end])] = end
        self.indexed = len(tokens)

    def match(self, tokens: list[int]) -> tuple[int, int]:
        """(length of the longest suffix seen before, position that followed it), or (0, 0)."""
        for n in range(min(self.longest, len(tokens) - 1), 0, -1):
            found = self.after.get(tuple(tokens[-n:]))
            if found is not None:
                return n, found
        return 0, 0


class NgramProposer(WithoutContext):
    """The free baseline: no features, no weights, a one-hot draft.

    Its confidence is the acceptance observed so far at the same suffix length and position (one success and one
    failure assumed to begin with); it depends on past rounds only, so it stays causal.
    """

    name = "ngram"

    def __init__(self, block_size: int = 7, longest: int = 4) -> None:
        self.block_size = block_size
        self.layer_ids: list[int] = []
        self.longest = longest
        self._index: dict[str, _Index] = {}
        self._matched: dict[str, int] = {}
        self._tries = torch.full((longest + 1, block_size), 2.0)
        self._hits = torch.full((longest + 1, block_size), 1.0)

    def admit(self, sequence: Sequence) -> None:
        self._index[sequence.request.id] = _Index(self.longest)

    def propose(self, sequences: list[Sequence]) -> Proposal:
        size = (len(sequences), self.block_size)
        tokens = torch.zeros(size, dtype=torch.int64)
        confidence = torch.zeros(size)
        counts = torch.zeros(len(sequences), dtype=torch.int64)
        for b, sequence in enumerate(sequences):
            index = self._index[sequence.request.id]
            index.extend(sequence.tokens)
            n, at = index.match(sequence.tokens)
            self._matched[sequence.request.id] = n
            found = sequence.tokens[at : at + self.block_size] if n else []
            counts[b] = len(found)
            if found:
                tokens[b, : len(found)] = torch.tensor(found)
                confidence[b, : len(found)] = (self._hits[n] / self._tries[n])[: len(found)]
        return Proposal(tokens, counts, confidence)

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        for c in commits:
            n = self._matched.get(c.sequence.request.id, 0)
            for k in range(min(c.verified, c.accepted + 1)):
                self._tries[n, k] += 1
                self._hits[n, k] += k < c.accepted

    def release(self, sequence: Sequence) -> None:
        self._index.pop(sequence.request.id, None)
        self._matched.pop(sequence.request.id, None)
