"""How many proposed tokens of each request the target verifies this step (DSpark, Algorithm 1).

Confidence c[b, k] is the calibrated probability that token k of request b is accepted given that all before it
are; a[b, k] = c[b, 0] * ... * c[b, k] is the probability that it is emitted. With a step cost t(tokens), verifying a
set S of prefixes emits B + sum(a) tokens in t(B + |S|) seconds; the scheduler maximises their quotient.

`early_stop` is causal: whether token k is verified depends only on what was known before token k was drawn, so it is
exact under both verification rules. `global` looks at every budget and is exact under the coupled rule and for greedy
decoding only (algorithms.md 1b and 6). `fixed` verifies a constant length.
"""

from __future__ import annotations

from typing import Protocol

import torch

from pipeline.errors import ConfigError, nearest

CAUSAL = frozenset({"early_stop", "fixed"})


class Cost(Protocol):
    """Seconds of one round that verifies `tokens` tokens in all at a mean context of `context` tokens."""

    def seconds(self, tokens: int, context: int) -> float: ...


class PrefixScheduler(Protocol):
    """Picks verification lengths.

    Args of `lengths`:
        confidence: float[B, K], conditional and calibrated.
        cost: seconds by tokens in the step.
        context: mean context length of the requests.
        limits: int64[B], most tokens to verify per request.
    Returns int64[B], 0 allowed.
    """

    name: str
    causal: bool

    def lengths(
        self, confidence: torch.Tensor, cost: Cost, context: int = 0, limits: torch.Tensor | None = None
    ) -> torch.Tensor: ...


class _Search:
    """Admits tokens by falling survival; ties by (position, request), which keeps prefixes whole."""

    def __init__(self, *, causal: bool) -> None:
        self.causal = causal
        self.name = "early_stop" if causal else "global"

    def lengths(
        self, confidence: torch.Tensor, cost: Cost, context: int = 0, limits: torch.Tensor | None = None
    ) -> torch.Tensor:
        requests, block = confidence.shape
        survival = confidence.double().cumprod(1).tolist()
        bound = [block] * requests if limits is None else [min(block, max(0, int(n))) for n in limits.tolist()]
        order = sorted(
            ((-survival[b][k], k, b) for b in range(requests) for k in range(bound[b])),
        )
        chosen = [0] * requests
        best = chosen.copy()
        emitted, tokens = float(requests), requests
        best_rate = emitted / cost.seconds(tokens, context)
        for negative, k, b in order:
            emitted -= negative
            tokens += 1
            chosen[b] = k + 1
            rate = emitted / cost.seconds(tokens, context)
            if rate > best_rate:
                best_rate, best = rate, chosen.copy()
            elif self.causal:
                break
        return torch.tensor(best, dtype=torch.int64)


class _Fixed:
    """Verifies `length` tokens of every request (None: the whole block)."""

    name, causal = "fixed", True

    def __init__(self, length: int | None) -> None:
        self.length = length

    def lengths(
        self, confidence: torch.Tensor, cost: Cost, context: int = 0, limits: torch.Tensor | None = None
    ) -> torch.Tensor:
        requests, block = confidence.shape
        length = block if self.length is None else min(self.length, block)
        out = torch.full((requests,), length, dtype=torch.int64)
        return out if limits is None else torch.minimum(out, limits.clamp(min=0))


def make_scheduler(name: str, length: int | None = None) -> PrefixScheduler:
    """`early_stop`, `global` or `fixed` (with its length; None is the whole block)."""
    if name == "early_stop":
        return _Search(causal=True)
    if name == "global":
        return _Search(causal=False)
    if name == "fixed":
        return _Fixed(length)
    names = ("early_stop", "global", "fixed")
    raise ConfigError(f"engine.scheduler={name!r} is not one of {', '.join(names)}.{nearest(name, names)}")
