"""The contract between the engine and whatever proposes tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Protocol

import torch

from pipeline.decoding.pages import PagePool
from pipeline.decoding.recorded import RecordingTerms
from pipeline.decoding.request import Sequence


@dataclasses.dataclass
class Proposal:
    """One block per running request. Its tensors are good until the proposer's next one: keep copies.

    Attributes:
        tokens: int64[B, K], target token ids; column k is drawn for position anchor + 1 + k.
        counts: int64[B], how many leading columns are real (a request may have fewer than K).
        confidence: float32[B, K], calibrated P(accepted | all before accepted).
        raw_confidence: float32[B, K] logits before calibration, or None where the draft has no confidence head.
        logits: float32[B, K, Vd], the transformed logits that the tokens were drawn from; None when each token is
            certain (a one-hot draft) or was not drawn at random.
        d2t: int64[Vd], target id of each draft token; None when Vd is the target's vocabulary.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    confidence: torch.Tensor
    raw_confidence: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    d2t: torch.Tensor | None = None

    @functools.cached_property
    def on_host(self) -> tuple[list[list[int]], torch.Tensor]:
        """tokens, and confidence float32[B, K] with 0 for NaN (a draft whose numbers fail is not worth verifying): read
        from the device in one copy, once."""
        return self._unpacked(self.packed().tolist())

    def packed(self) -> torch.Tensor:
        """int64[B, 2 K]: tokens, and the bits of their confidences."""
        bits = self.confidence.float().contiguous().view(torch.int32)
        return torch.cat((self.tokens, bits.long()), 1)

    def read(self, rows: list[list[int]]) -> None:
        """Takes what somebody else read of `packed`, so that `on_host` reads nothing."""
        self.__dict__["on_host"] = self._unpacked(rows)

    def _unpacked(self, rows: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
        block = self.tokens.shape[1]
        confidence = torch.tensor([row[block:] for row in rows], dtype=torch.int32).view(torch.float32)
        return [row[:block] for row in rows], confidence.nan_to_num(0.0)


@dataclasses.dataclass
class Commit:
    """Positions of one sequence that became part of its text, in order.

    `start` is the absolute position of the first; `rows` selects their taps in those it comes with; `verified` and
    `accepted` describe the round they came from (both 0 for prompt chunks).
    """

    sequence: Sequence
    start: int
    rows: slice
    verified: int = 0
    accepted: int = 0


class Proposer(Protocol):
    """Proposes a block per request; told, before it is asked for a text, of every position that became part of it.

    Attributes:
        name: the draft's name in metrics.
        block_size: K, most tokens per proposal (0: never proposes).
        layer_ids: tapped target layers it needs (empty: none).
    """

    name: str
    block_size: int
    layer_ids: list[int]

    def page_bytes(self, size: int) -> int:
        """What a page of `size` positions takes of the draft's own memory."""
        ...

    def attach(self, pool: PagePool, terms: RecordingTerms | None = None) -> None:
        """Makes room for keys and values in an engine's pages; leaves the pool of another, if it was in one.

        terms: how its steps are recorded; None: they are not.

        Raises DraftlineError: not enough memory.
        """
        ...

    def detach(self, pool: PagePool) -> None:
        """Lets that room go, if it still is in this pool; no request is with the draft any more."""
        ...

    def wipe(self, pages: list[int]) -> None:
        """Zeroes its keys and values in pages that may hold values that are not finite."""
        ...

    def tag(self, sequence: Sequence, end: int) -> Hashable | None:
        """What a page that ends at position `end` of the request must bear (see PagePool.mark) for the draft to find
        its own keys in it; None: it keeps none."""
        ...

    def admit(self, sequence: Sequence) -> None:
        """A request begins, or begins again, with `computed` positions in pages that bear the draft's tags."""
        ...

    def propose(self, sequences: list[Sequence]) -> Proposal: ...

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        """Extends the draft's context; `taps` [T, L*D] are rows of one step, or of several that were held back."""
        ...

    def release(self, sequence: Sequence) -> None: ...


class WithoutContext:
    """Of proposers that keep no keys and values."""

    def page_bytes(self, size: int) -> int:
        return 0

    def attach(self, pool: PagePool, terms: RecordingTerms | None = None) -> None: ...

    def detach(self, pool: PagePool) -> None: ...

    def wipe(self, pages: list[int]) -> None: ...

    def tag(self, sequence: Sequence, end: int) -> None:
        return None
