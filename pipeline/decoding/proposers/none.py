"""Plain decoding: proposes nothing, so that every step emits the target's one token."""

from __future__ import annotations

import torch

from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.request import Sequence


class NoneProposer:
    """The autoregressive baseline, in the same engine as everything that is compared with it."""

    name = "none"
    block_size = 0

    def __init__(self) -> None:
        self.layer_ids: list[int] = []

    def page_bytes(self, size: int) -> int:
        return 0

    def attach(self, pool: PagePool) -> None: ...

    def detach(self, pool: PagePool) -> None: ...

    def tag(self, sequence: Sequence, end: int) -> None:
        return None

    def admit(self, sequence: Sequence) -> None: ...

    def propose(self, sequences: list[Sequence]) -> Proposal:
        empty = torch.zeros(len(sequences), 0)
        return Proposal(empty.long(), torch.zeros(len(sequences), dtype=torch.int64), empty)

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None: ...

    def release(self, sequence: Sequence) -> None: ...
