"""How many proposed tokens of each request the target verifies this step (DSpark, Algorithm 1).

Confidence c[b, k] is the calibrated probability that token k of request b is accepted given that all before it
are; a[b, k] = c[b, 0] * ... * c[b, k] is the probability that it is emitted. With a step cost t(tokens), verifying a
set S of prefixes emits B + sum(a) tokens in t(B + |S|) seconds; the search maximises their quotient over the tokens in
the order of falling a.

A schedule is causal if what decides on a token was known before that token was drawn; it is then exact under both
verification rules. c[b, k] sees the tokens of its block before k and never token k itself (every proposer's test says
so), and a falls along a block, so that whatever asks only about tokens of higher rank is causal:

    early_stop     admits tokens until the first that does not pay.
    asynchronous   admits as many tokens as the whole search found best two steps before: it steps over a dear size of
                   step where early_stop stops, and its budget is older than every token it decides on.
    threshold      admits while a >= threshold, whatever a step costs: for comparison.
    fixed          verifies a constant length.

A runner with CUDA graphs pads a step to the next of a few sizes, its buckets. `filled` puts the best of the tokens left
where padding would be, as they cost nothing. That keeps a causal schedule causal: the tokens that decide where the
schedule ends, and with it the bucket, rank above each token that fills it.

`global` takes the best of all budgets by the step's own confidences. What it gives token k depends on tokens after k
and so on k itself: exact under the coupled rule and for greedy decoding only (algorithms.md 1b and 6).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from pipeline.errors import ConfigError, nearest

NAMES = ("global", "early_stop", "asynchronous", "threshold", "fixed")
Ranked = list[tuple[float, int, int]]
"""(-a, position, request) of every token that may be verified, best first."""


class Cost(Protocol):
    """Seconds of rounds that verify int64[N] `tokens` in all at a mean context of `context` tokens, float64[N]."""

    def rounds(self, tokens: np.ndarray, context: int) -> np.ndarray: ...


class PrefixScheduler(Protocol):
    """Picks verification lengths.

    Args of `lengths`:
        confidence: float[B, K], conditional and calibrated.
        cost: seconds by tokens in the step, asked once for all; None will do where `weighs_cost` is false.
        context: mean context length of the requests.
        limits: int64[B], most tokens to verify per request.
        buckets: sizes that steps are padded to (see `filled`); `fixed` has no use for them.
    Returns int64[B], 0 allowed.

    Attributes:
        causal: decides on a token by what was known before it was drawn. weighs_cost: needs a step cost.
        stops: at the first token that does not pay. foresees: how much it verifies, sooner or later.
    """

    name: str
    causal: bool
    weighs_cost: bool
    stops: bool
    foresees: bool

    def lengths(
        self,
        confidence: torch.Tensor,
        cost: Cost,
        context: int = 0,
        limits: torch.Tensor | None = None,
        buckets: Sequence[int] = (),
    ) -> torch.Tensor: ...

    def foreseen(self, limits: Sequence[int], buckets: Sequence[int] = ()) -> int | list[int] | None:
        """What is known of the next lengths before the host has seen its confidences: how many draft tokens are
        verified in all (`spread` then says whose), or every length; None: nothing. limits: most of each request."""
        ...

    def learn(self, confidence: torch.Tensor, cost: Cost, context: int, limits: torch.Tensor) -> None:
        """Hears the confidences of a step whose lengths were foreseen, as `lengths` would have."""
        ...


class _FromConfidences:
    """Of schedules that foresee nothing."""

    stops = foresees = False

    def foreseen(self, limits: Sequence[int], buckets: Sequence[int] = ()) -> None:
        return None

    def learn(self, confidence: torch.Tensor, cost: Cost, context: int, limits: torch.Tensor) -> None: ...


def spread(confidence: torch.Tensor, limits: torch.Tensor, count: int) -> torch.Tensor:
    """The lengths int64[B] that `count` tokens of highest survival make, ties by (position, request), worked out on the
    device that confidence float[B, K] and limits int64[B] are on; nobody waits for it."""
    requests, block = confidence.shape
    survival = confidence.double().nan_to_num(0.0).cumprod(1).cummin(1).values  # prefixes, whatever rounding does
    slot = torch.arange(block, device=confidence.device)
    offered = torch.where(slot < limits[:, None], survival, -1.0)
    first = offered.T.flatten().sort(descending=True, stable=True).indices[:count]
    lengths = torch.zeros(requests, dtype=torch.int64, device=confidence.device)
    return lengths.index_add_(0, first % requests, torch.ones_like(first))


def ranked(confidence: torch.Tensor, limits: torch.Tensor | None = None) -> Ranked:
    """Tokens by falling survival; ties by (position, request), which keeps prefixes whole.

    Args:
        confidence: float[B, K], conditional. limits: int64[B], most tokens per request.
    """
    requests, block = confidence.shape
    survival = confidence.double().cumprod(1).tolist()
    bound = [block] * requests if limits is None else [min(block, max(0, int(n))) for n in limits.tolist()]
    return sorted((-survival[b][k], k, b) for b in range(requests) for k in range(bound[b]))


def rates(order: Ranked, requests: int, cost: Cost, context: int) -> np.ndarray:
    """float64[N + 1]: tokens emitted per second where none, one, two, ... of the N ranked ones are verified."""
    # Added one by one from the front, so that each prefix has one sum whatever comes after it.
    emitted = np.cumsum([float(requests), *(-negative for negative, _, _ in order)])
    return emitted / cost.rounds(np.arange(requests, requests + len(order) + 1), context)


def best(rates: np.ndarray, *, stop: bool = False) -> int:
    """How many tokens have the highest rate, the fewest of equals.

    Args:
        stop: end at the first token that does not raise the rate.
    """
    if not stop:
        return int(rates.argmax())
    pays = rates[1:] > rates[:-1]
    return len(pays) if pays.all() else int(pays.argmin())


def filled(count: int, available: int, requests: int, buckets: Sequence[int]) -> int:
    """How many ranked draft tokens a step takes at no cost, where the schedule chose `count` of `available`.

    Args:
        requests: tokens in the step besides, one of each request.
        buckets: sizes that steps are padded to; a step beyond the largest is not padded.
    """
    size = min((b for b in buckets if b >= requests + count), default=0)
    return min(max(size - requests, count), available)


def _lengths(order: Ranked, count: int, requests: int, buckets: Sequence[int]) -> torch.Tensor:
    """int64[B] of the first `count` ranked tokens, and those that fill their bucket."""
    count = filled(count, len(order), requests, buckets)
    chosen = [0] * requests
    for _, k, b in order[:count]:
        chosen[b] = k + 1
    return torch.tensor(chosen, dtype=torch.int64)


class _Search(_FromConfidences):
    """The best budget by this step's confidences: among all, or up to the first token that does not pay."""

    weighs_cost = True

    def __init__(self, *, causal: bool) -> None:
        self.causal = causal
        self.name = "early_stop" if causal else "global"
        self.stops = causal

    def lengths(
        self,
        confidence: torch.Tensor,
        cost: Cost,
        context: int = 0,
        limits: torch.Tensor | None = None,
        buckets: Sequence[int] = (),
    ) -> torch.Tensor:
        requests = confidence.shape[0]
        order = ranked(confidence, limits)
        count = best(rates(order, requests, cost, context), stop=self.causal)
        return _lengths(order, count, requests, buckets)


class _Asynchronous:
    """The best budget by the confidences of two steps before, spent on the tokens of highest survival now.

    The budget counts draft tokens per request, as requests come and go between the two steps. Until there are two
    steps to look back on, it is early_stop.
    """

    name, causal, weighs_cost = "asynchronous", True, True
    stops, foresees = False, True

    def __init__(self) -> None:
        self._budgets: collections.deque[float] = collections.deque(maxlen=2)

    def lengths(
        self,
        confidence: torch.Tensor,
        cost: Cost,
        context: int = 0,
        limits: torch.Tensor | None = None,
        buckets: Sequence[int] = (),
    ) -> torch.Tensor:
        requests = confidence.shape[0]
        order = ranked(confidence, limits)
        rated = rates(order, requests, cost, context)
        if len(self._budgets) == 2:
            count = min(round(self._budgets[0] * requests), len(order))
        else:
            count = best(rated, stop=True)
        # This step's own search is for the step after the next: here it would look at what it decides on.
        self._budgets.append(best(rated) / requests)
        return _lengths(order, count, requests, buckets)

    def foreseen(self, limits: Sequence[int], buckets: Sequence[int] = ()) -> int | None:
        if len(self._budgets) < 2:
            return None
        requests, available = len(limits), sum(limits)
        return filled(min(round(self._budgets[0] * requests), available), available, requests, buckets)

    def learn(self, confidence: torch.Tensor, cost: Cost, context: int, limits: torch.Tensor) -> None:
        requests = confidence.shape[0]
        self._budgets.append(best(rates(ranked(confidence, limits), requests, cost, context)) / requests)


class _Threshold(_FromConfidences):
    """Tokens that are emitted with at least a given probability."""

    name, causal, weighs_cost = "threshold", True, False

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"engine.threshold={threshold} must be above 0 and at most 1.")
        self.threshold = threshold

    def lengths(
        self,
        confidence: torch.Tensor,
        cost: Cost | None,
        context: int = 0,
        limits: torch.Tensor | None = None,
        buckets: Sequence[int] = (),
    ) -> torch.Tensor:
        requests = confidence.shape[0]
        order = ranked(confidence, limits)
        return _lengths(order, sum(-negative >= self.threshold for negative, _, _ in order), requests, buckets)


class _Fixed:
    """Verifies `length` tokens of every request (None: the whole block)."""

    name, causal, weighs_cost = "fixed", True, False
    stops, foresees = False, True

    def __init__(self, length: int | None) -> None:
        self.length = length

    def lengths(
        self,
        confidence: torch.Tensor,
        cost: Cost | None,
        context: int = 0,
        limits: torch.Tensor | None = None,
        buckets: Sequence[int] = (),
    ) -> torch.Tensor:
        requests, block = confidence.shape
        length = block if self.length is None else min(self.length, block)
        out = torch.full((requests,), length, dtype=torch.int64)
        return out if limits is None else torch.minimum(out, limits.clamp(min=0))

    def foreseen(self, limits: Sequence[int], buckets: Sequence[int] = ()) -> list[int]:
        return [max(n, 0) if self.length is None else max(min(self.length, n), 0) for n in limits]

    def learn(self, confidence: torch.Tensor, cost: Cost, context: int, limits: torch.Tensor) -> None: ...


def make_scheduler(name: str, length: int | None = None, threshold: float = 0.5) -> PrefixScheduler:
    """A new scheduler by name: `fixed` with its length (None is the whole block), `threshold` with its own.

    Raises ConfigError for an unknown name or a threshold outside (0, 1].
    """
    if name in ("early_stop", "global"):
        return _Search(causal=name == "early_stop")
    if name == "asynchronous":
        return _Asynchronous()
    if name == "threshold":
        return _Threshold(threshold)
    if name == "fixed":
        return _Fixed(length)
    raise ConfigError(f"engine.scheduler={name!r} is not one of {', '.join(NAMES)}.{nearest(name, NAMES)}")
