"""Drawing a block token by token, as every neural draft does it.

Nothing here looks at a value on the host: a block can be recorded (pipeline/decoding/recorded.py) and waits for nobody.
Letters: B requests, G tokens per block, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from draftline_kernels import Block, Code, Sampling, at_once, markov_block
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.recorded import Mirror
from pipeline.decoding.request import Sequence
from pipeline.drafts.base import Draft

Confidence = Callable[[torch.Tensor], torch.Tensor | None]


def into_dtype(draft: Draft, dtype: torch.dtype) -> None:
    """Puts the draft's weights into the dtype that its target decodes in; calibration and rotary frequencies stay as
    they are."""
    for weight in draft.parameters():
        weight.data = weight.data.to(dtype)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What blocks are drafted for.

    Attributes:
        anchors: int64[B] absolute positions of the last tokens. previous: int64[B], those tokens.
        state: [B, D], what a draft carries over from its last commit (Eagle3's g); None where it carries nothing.
    """

    anchors: torch.Tensor
    previous: torch.Tensor
    sampling: Sampling
    state: torch.Tensor | None = None

    @classmethod
    def of(cls, sequences: list[Sequence], state: torch.Tensor | None = None) -> Asked:
        """What these requests ask for, on the CPU; the state stays where it is."""
        wanted = (s.request for s in sequences)
        sampling = Sampling.of([(r.temperature, r.top_k, r.top_p, r.seed, r.min_p) for r in wanted])
        anchors = torch.tensor([len(s.tokens) - 1 for s in sequences])
        return cls(anchors, torch.tensor([s.tokens[-1] for s in sequences]), sampling, state)

    @property
    def kind(self) -> tuple[bool, bool]:
        """What decides which operations a block is drawn by."""
        return self.sampling.greedy, self.sampling.truncated

    def on(self, device: torch.device) -> Asked:
        """The same on a device, in one copy that nobody waits for."""
        return self if device.type == "cpu" else self._with(at_once(self.tensors, device), self.state)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All but the state, [B] each."""
        s = self.sampling
        return [self.anchors, self.previous, s.temperature, s.top_k, s.top_p, s.seed, s.min_p]

    def _with(self, tensors: list[torch.Tensor], state: torch.Tensor | None) -> Asked:
        """Of the same kind, made of others."""
        anchors, previous, temperature, top_k, top_p, seed, min_p = tensors
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, decided=self.kind)
        return Asked(anchors, previous, sampling, state)


class Room:
    """What a recorded block reads of the requests, for up to `batch` of them, at addresses that stay: the values of the
    last `fill`, and greedy ones behind them.

    Args:
        asked: of the kind, dtypes and state that it will be filled with.
    Attributes:
        asked: on the device.
    """

    def __init__(self, asked: Asked, batch: int, device: torch.device) -> None:
        empty = [t.new_zeros(batch) for t in asked.tensors]
        # One buffer of 64-bit places: any dtype fits, and any start is aligned.
        self._mirror = Mirror([len(empty), batch + batch % 2], torch.int64, device)
        self._rows = [row.view(t.dtype)[:batch] for row, t in zip(self._mirror.host, empty, strict=True)]
        there = [row.view(t.dtype)[:batch] for row, t in zip(self._mirror.device, empty, strict=True)]
        state = None if asked.state is None else asked.state.new_zeros(batch, *asked.state.shape[1:])
        self.asked = asked._with(there, state)

    def fill(self, asked: Asked) -> None:
        """Takes over the values of a smaller or equally large one of the same kind."""
        self._mirror.wait()
        for mine, new in zip(self._rows, asked.tensors, strict=True):
            mine[: len(new)] = new
            mine[len(new) :] = 0
        self._mirror.send()
        if self.asked.state is not None and asked.state is not None:
            self.asked.state[: len(asked.state)].copy_(asked.state)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Blocks as drawn: tokens int64[B, G], calibrated and raw confidence float32[B, G], and logits float32[B, G, Vd] of
    what the tokens were drawn from, where verification asks for it."""

    tokens: torch.Tensor
    confidence: torch.Tensor
    raw_confidence: torch.Tensor
    logits: torch.Tensor | None

    def proposal(self, batch: int, d2t: torch.Tensor) -> Proposal:
        """Of the first `batch` requests."""
        tokens = self.tokens[:batch]
        counts = torch.full((batch,), tokens.shape[1], dtype=torch.int64)
        logits = self.logits
        if logits is not None and len(logits) != batch:
            logits = logits[:batch]
        return Proposal(tokens, counts, self.confidence[:batch], self.raw_confidence[:batch], logits, d2t)


class Drawing:
    """A block of every request in the making.

    Args:
        rule: verification rule, which decides the noise that tokens are drawn with.
    Attributes:
        previous: int64[B], the tokens before the slot that is drawn next (the anchors at first).
        seen: what `previous` was at each slot so far.
    """

    def __init__(self, draft: Draft, asked: Asked, rule: str) -> None:
        self.draft, self.rule, self._asked = draft, rule, asked
        self.previous = asked.previous
        self.seen: list[torch.Tensor] = []
        self._columns: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._peaks: list[torch.Tensor] = []

    def draw(self, logits: torch.Tensor) -> None:
        """The next slot's tokens from its logits [B, Vd]; the most likely ones where decoding is greedy."""
        self.seen.append(self.previous)
        if self.draft.confidence_head is None:
            # Of the distribution and not of the token drawn: what is admitted must not depend on what was drawn.
            best = logits.float().log_softmax(-1).amax(-1)
            self._peaks.append(best - torch.log1p(-best.exp().clamp(max=1 - 1e-6)))
        drawn = self._block(logits[:, None], None, None)
        if drawn.logits is not None:
            self._kept.append(drawn.logits[:, 0])
        self.previous = drawn.tokens[:, 0]
        self._columns.append(self.previous)

    def in_one(self, base: torch.Tensor, code: Code | None, w2: torch.Tensor | None, confidence: Confidence) -> Drawn:
        """The whole block from base logits [B, G, Vd] and a Markov head (see `markov_block`).

        Args:
            confidence: the head's logits float[B, G] from the tokens before each slot, int64[B, G].
        """
        block = self._block(base, code, w2)
        raw = confidence(block.seen)
        if raw is None:
            raise RuntimeError("a block drawn in one needs a confidence head: nothing of its logits is kept")
        return self._finished(block.tokens, block.logits, raw)

    def drawn(self, raw: torch.Tensor | None) -> Drawn:
        """The finished block.

        Args:
            raw: float[B, G], the confidence head's logits. None takes the log-odds of each slot's most likely token,
                which calibration turns into acceptance as it does a head's.
        """
        logits = torch.stack(self._kept, 1) if self._kept else None
        return self._finished(
            torch.stack(self._columns, 1), logits, torch.stack(self._peaks, 1) if raw is None else raw
        )

    def _block(self, base: torch.Tensor, code: Code | None, w2: torch.Tensor | None) -> Block:
        """Slots from the next one on, of base logits [B, slots, Vd]."""
        asked = self._asked
        return markov_block(
            base,
            code,
            w2,
            self.previous,
            asked.anchors,
            asked.sampling,
            vocabulary=self.draft.embed.shape[0],
            d2t=self.draft.d2t,
            rule=self.rule,
            logits=self.rule == "ratio" and not asked.sampling.greedy,
            first=len(self._columns),
        )

    def _finished(self, tokens: torch.Tensor, logits: torch.Tensor | None, raw: torch.Tensor) -> Drawn:
        """Of tokens int64[B, G], what they were drawn from, float32[B, G, Vd], and confidences before calibration."""
        raw = raw.float()
        return Drawn(tokens, torch.sigmoid(raw / self.draft.temperatures), raw, logits)
