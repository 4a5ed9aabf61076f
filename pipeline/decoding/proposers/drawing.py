"""Drawing a block token by token, as every neural draft does it.

Letters: B requests, G tokens per block, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from draftline_kernels import Code, Sampling, draw, markov_block, proposal_stream, transform
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence
from pipeline.drafts.base import Draft

Confidence = Callable[[torch.Tensor], torch.Tensor | None]


def into_dtype(draft: Draft, dtype: torch.dtype) -> None:
    """Puts the draft's weights into the dtype that its target decodes in; calibration and rotary frequencies stay as
    they are."""
    for weight in draft.parameters():
        weight.data = weight.data.to(dtype)


class Drawing:
    """A block of every request in the making.

    Args:
        rule: verification rule, which decides the noise that tokens are drawn with.
    Attributes:
        previous: int64[B], the tokens before the slot that is drawn next (the anchors at first).
        seen: what `previous` was at each slot so far.
    """

    def __init__(self, draft: Draft, sequences: list[Sequence], rule: str) -> None:
        device = draft.d2t.device
        self.draft, self.rule = draft, rule
        self.anchors = torch.tensor([len(s.tokens) - 1 for s in sequences], device=device)
        self.previous = torch.tensor([s.tokens[-1] for s in sequences], device=device)
        self.seen: list[torch.Tensor] = []
        asked = (s.request for s in sequences)
        self._sampling = Sampling.of([(r.temperature, r.top_k, r.top_p, r.seed, r.min_p) for r in asked], device)
        self._columns: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._peaks: list[torch.Tensor] = []

    def draw(self, logits: torch.Tensor) -> None:
        """The next slot's tokens from its logits [B, Vd]; the most likely ones where decoding is greedy."""
        sampling, d2t = self._sampling, self.draft.d2t
        self.seen.append(self.previous)
        if self.draft.confidence_head is None:
            # Of the distribution and not of the token drawn: what is admitted must not depend on what was drawn.
            best = logits.float().log_softmax(-1).amax(-1)
            self._peaks.append(best - torch.log1p(-best.exp().clamp(max=1 - 1e-6)))
        if sampling.greedy:
            self.previous = d2t[logits.argmax(-1)]
        else:
            logits = transform(logits.float(), sampling.temperature, sampling.top_k, sampling.top_p)
            if self.rule == "ratio":
                self._kept.append(logits)
            self.previous = draw(
                logits,
                sampling.seed,
                self.anchors + 1 + len(self._columns),
                d2t,
                temperature=sampling.temperature,
                stream=proposal_stream(self.rule),
                anchor=self.anchors if self.rule == "ratio" else None,
            )
        self._columns.append(self.previous)

    def in_one(
        self, base: torch.Tensor, code: Code | None, w2: torch.Tensor | None, confidence: Confidence
    ) -> Proposal:
        """The whole block from base logits [B, G, Vd] and a Markov head (see `markov_block`).

        Args:
            confidence: the head's logits float[B, G] from the tokens before each slot, int64[B, G].
        """
        sampled = self.rule == "ratio" and not self._sampling.greedy
        block = markov_block(
            base,
            code,
            w2,
            self.previous,
            self.anchors,
            self._sampling,
            vocabulary=self.draft.embed.shape[0],
            d2t=self.draft.d2t,
            rule=self.rule,
            logits=sampled,
        )
        raw = confidence(block.seen)
        if raw is None:
            raise RuntimeError("a block drawn in one needs a confidence head: nothing of its logits is kept")
        return self._finished(block.tokens, block.logits, raw)

    def proposal(self, raw: torch.Tensor | None) -> Proposal:
        """The finished block.

        Args:
            raw: float[B, G], the confidence head's logits. None takes the log-odds of each slot's most likely token,
                which calibration turns into acceptance as it does a head's.
        """
        logits = torch.stack(self._kept, 1) if self._kept else None
        return self._finished(
            torch.stack(self._columns, 1), logits, torch.stack(self._peaks, 1) if raw is None else raw
        )

    def _finished(self, tokens: torch.Tensor, logits: torch.Tensor | None, raw: torch.Tensor) -> Proposal:
        """Of tokens int64[B, G], what they were drawn from, float32[B, G, Vd], and confidences before calibration."""
        raw = raw.float()
        return Proposal(
            tokens,
            torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int64),
            torch.sigmoid(raw / self.draft.temperatures),
            raw,
            logits,
            self.draft.d2t,
        )
