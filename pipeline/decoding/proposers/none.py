"""Plain decoding: proposes nothing, so that every step emits the target's one token."""

from __future__ import annotations

import torch

from pipeline.decoding.proposers.base import Commit, Proposal, WithoutContext
from pipeline.decoding.request import Sequence


class NoneProposer(WithoutContext):
    """The autoregressive baseline, in the same engine as everything that is compared with it."""

    name = "none"
    block_size = 0

    def __init__(self) -> None:
        self.layer_ids: list[int] = []

    def admit(self, sequence: Sequence) -> None: ...

    def propose(self, sequences: list[Sequence]) -> Proposal:
        empty = torch.zeros(len(sequences), 0)
        return Proposal(empty.long(), torch.zeros(len(sequences), dtype=torch.int64), empty)

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None: ...

    def release(self, sequence: Sequence) -> None: ...
