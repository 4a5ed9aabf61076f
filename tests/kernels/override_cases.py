"""Batches of requests with and without bias and penalties, and what a dense computation in float64 says to them."""

from __future__ import annotations

import math
from typing import Any

import torch

from draftline_kernels import (
    BLOCK,
    Adjustment,
    Overrides,
    Sampling,
    VerifyResult,
    draw,
    proposal_stream,
    touched,
    verify,
)

Ask = tuple[float, int, float, float]
"""Temperature, top_k, top_p, min_p."""
ASKS: dict[str, list[Ask]] = {
    "greedy": [(0.0, 0, 1.0, 0.0)],
    "plain": [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0)],
    "narrowed": [(1.5, 0, 1.0, 0.05), (1.2, 5, 1.0, 0.0), (1.2, 0, 0.8, 0.0), (1.5, 9, 0.9, 0.02)],
    "mixed": [(0.0, 0, 1.0, 0.0), (1.5, 0, 0.9, 0.05), (0.9, 20, 1.0, 0.0)],
}
WIDTH = BLOCK + 300
HOT = (0, 7, 300, BLOCK - 1, BLOCK, BLOCK + 5, WIDTH - 1)
"""Likely tokens, on both sides of a block's edge: what is said of them decides."""
LENGTHS = (3, 2, 3, 1, 3, 0, 2, 3)
ADJUSTMENTS = (
    None,
    Adjustment(bias={BLOCK - 1: 3.0, BLOCK: -4.0, WIDTH - 1: 2.5, 7: -100.0}),
    Adjustment(repetition=1.3, presence=0.4, frequency=2.5),
    Adjustment(frequency=3.0),
    Adjustment(1.2, 0.3, 2.5, {9: -1.0, BLOCK: 2.0, WIDTH - 1: 1.0}),
    Adjustment(repetition=1.5, bias={0: 2.0}),
    None,
    Adjustment(presence=-1.5, bias={300: 1.0}),
)
PROMPT, ANSWER = [3, 7, BLOCK, 7, 800], [BLOCK - 1, 7, 2 * 7, WIDTH - 1, 7]


def adjusted(row: torch.Tensor, adjustment: Adjustment | None, said: list[int]) -> torch.Tensor:
    """float64 [V], token by token, after PROMPT and what was said behind it."""
    z = row.double().clone()
    if adjustment is None:
        return z
    for token, bias in adjustment.bias.items():
        z[token] += bias
    for token in {*PROMPT, *said}:
        z[token] = z[token] / adjustment.repetition if z[token] > 0 else z[token] * adjustment.repetition
    for token in set(said):
        z[token] -= adjustment.frequency * said.count(token) + adjustment.presence
    return z


def narrowed(z: torch.Tensor, ask: Ask) -> torch.Tensor:
    """z float64 [V] after temperature, -inf outside min-p, then top-k, then top-p."""
    temperature, top_k, top_p, min_p = ask
    z = z / temperature
    if min_p:
        z = z.masked_fill(z < z.max() + math.log(min_p), float("-inf"))
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        best = z.sort(descending=True, stable=True)
        p = best.values.softmax(-1)
        z = z.index_fill(0, best.indices[p.cumsum(-1) - p >= top_p], float("-inf"))
    return z


class Case:
    """A ragged batch whose proposals a draft near the adjusted target drew.

    Attributes:
        offered: each request's proposed tokens. asks, adjustments: of each request. certain: what the draft drew them
            from isn't told.
    """

    def __init__(
        self, rule: str, asks: str, dtype: torch.dtype = torch.float32, d2t: torch.Tensor | None = None, seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rule, self.d2t = rule, d2t
        self.certain = False
        self.asks = [ASKS[asks][b % len(ASKS[asks])] for b in range(len(LENGTHS))]
        self.adjustments = list(ADJUSTMENTS)
        rows = [n + 1 for n in LENGTHS]
        logits = torch.randn(sum(rows), WIDTH, generator=g) * 2
        logits[:, HOT] += 7.0
        logits[3:7, 800] = logits[3:7, BLOCK + 5] = float("-inf")  # of a request without and one with entries there
        self.logits = logits.to(dtype)
        self.cumulative = torch.tensor([0, *rows]).cumsum(0)
        self.positions = torch.randint(0, 5000, (len(rows),), generator=g)
        columns = torch.arange(WIDTH) if d2t is None else d2t
        self.tokens = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64)
        self.q = torch.randn(len(rows), max(LENGTHS), len(columns), generator=g)
        for b, length in enumerate(LENGTHS):
            for k in range(length):
                row = self.logits[self.cumulative[b] + k]
                z = adjusted(row, self.adjustments[b], [*ANSWER, *self.tokens[b, :k].tolist()])
                near = narrowed(z, self.asks[b]) if self.asks[b][0] else z
                near = near[columns].float() + (3.0 if k else 0.3) * torch.randn(len(columns), generator=g)
                self.q[b, k] = near
                at = self.positions[b : b + 1]
                drawn = draw(
                    near[None],
                    torch.tensor([31 * b]),
                    at + 1 + k,
                    d2t,
                    temperature=torch.tensor([self.asks[b][0]]),
                    stream=proposal_stream(rule),
                    anchor=at if rule == "ratio" else None,
                )
                self.tokens[b, k] = drawn[0]
        self.offered = [self.tokens[b, :n].tolist() for b, n in enumerate(LENGTHS)]

    def overrides(self, device: torch.device | str = "cpu") -> Overrides | None:
        parts = [
            None if a is None else touched(a, prompt=PROMPT, answer=ANSWER, proposed=said, vocabulary=WIDTH)
            for a, said in zip(self.adjustments, self.offered, strict=True)
        ]
        return Overrides.of(parts, [n + 1 for n in LENGTHS], WIDTH, device)

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Of `verify`."""
        sampling = Sampling.of([(*ask[:3], 31 * b, ask[3]) for b, ask in enumerate(self.asks)], device)
        return {
            "target_logits": self.logits.to(device),
            "sampling": sampling,
            "overrides": self.overrides(device),
            **self._rest(device),
        }

    def _rest(self, device: torch.device | str) -> dict[str, Any]:
        return {
            "tokens": self.tokens.to(device),
            "lengths": torch.tensor(LENGTHS, device=device),
            "cu_lengths": self.cumulative.to(device),
            "positions": self.positions.to(device),
            "rule": self.rule,
            "draft_logits": self.q.to(device) if self.rule == "ratio" and not self.certain else None,
            "d2t": None if self.d2t is None else self.d2t.to(device),
        }

    def dense(self, forget_block: bool = False) -> VerifyResult:
        """What every row's own float64 logits, adjusted and narrowed token by token, lead to; forget_block: as if what
        is proposed in a block counted nowhere."""
        out = []
        for b, length in enumerate(LENGTHS):
            for i in range(length + 1):
                said = ANSWER if forget_block else [*ANSWER, *self.offered[b][:i]]
                z = adjusted(self.logits[self.cumulative[b] + i], self.adjustments[b], said)
                out.append(narrowed(z, self.asks[b]) if self.asks[b][0] else z)
        sampling = Sampling.of([(float(ask[0] > 0), 0, 1.0, 31 * b) for b, ask in enumerate(self.asks)])
        return verify(torch.stack(out).float(), sampling=sampling, **self._rest("cpu"))


def same(got: VerifyResult, wanted: VerifyResult) -> bool:
    """Whether two results are one."""
    names = ("finite", "accepted", "next_token")
    return all(getattr(got, n).tolist() == getattr(wanted, n).tolist() for n in names)
