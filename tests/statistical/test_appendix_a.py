"""The paper's Appendix A: a schedule that sees what it decides on biases the ratio rule, and only that.

Costs make one verified token not worth its step but two worth theirs when the first is A. A schedule that looks ahead
(`global`) then verifies A and drops B unseen: with the ratio rule P(A) becomes 0.5 + 0.5 * 0.7 = 0.85 where the target
says 0.7. The causal searches do not: early_stop stops at the first token that does not pay, and the asynchronous
budget is older than what it is spent on. The coupled rule emits the target's own sample whatever was verified.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from draftline_kernels import Sampling, draw, proposal_stream, verify
from pipeline.decoding.scheduler import make_scheduler
from tests.statistical.chi_square import p_value

A, B = 0, 1
P = torch.tensor([0.7, 0.3])
Q = torch.tensor([0.5, 0.5])
DRAWS = 200_000


class PaperCost:
    """Steps per second 1, 0.5 and 0.45 for one, two and three tokens."""

    def rounds(self, tokens: np.ndarray, context: int) -> np.ndarray:
        return 1 / np.array([1.0, 0.5, 0.45])[tokens - 1]


def first_tokens(rule: str, scheduler: str) -> torch.Tensor:
    """Counts int64[2] of the first token emitted after the anchor."""
    n = DRAWS
    sampling = Sampling.of([(1.0, 0, 1.0, i) for i in range(n)])
    positions = torch.full((n,), 4)
    anchor = positions if rule == "ratio" else None
    columns = [
        draw(Q.log().expand(n, -1), sampling.seed, positions + 1 + k, stream=proposal_stream(rule), anchor=anchor)
        for k in (0, 1)
    ]
    block = torch.stack(columns, 1)
    # The confidence of the second token sees the first: that is what makes a look-ahead leak.
    confidence = {first: torch.tensor([[0.8, 0.9 if first == A else 0.0]]) for first in (A, B)}
    # Schedulers that remember: a draw comes after two others, whose first tokens are as random as its own.
    chosen = torch.zeros(2, 2, 2, dtype=torch.int64)
    for before, last, first in itertools.product((A, B), repeat=3):
        search = make_scheduler(scheduler)
        for past in (before, last):
            search.lengths(confidence[past], PaperCost())
        chosen[before, last, first] = search.lengths(confidence[first], PaperCost())[0]
    past = torch.randint(2, (2, n), generator=torch.Generator().manual_seed(0))
    lengths = chosen[past[0], past[1], block[:, 0]]
    if scheduler == "asynchronous":
        assert 0.4 < float((lengths == 2).double().mean()) < 0.6, "it looks as far ahead as global, but later"
    cumulative = torch.cat((torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)))
    rows = P.log().expand(int(cumulative[-1]), -1)
    q = Q.log().expand(n, 2, -1) if rule == "ratio" else None
    got = verify(rows, block, lengths, cumulative, sampling, positions, rule, q)
    return torch.bincount(torch.where(got.accepted > 0, block[:, 0], got.next_token), minlength=2)


def test_look_ahead_breaks_the_ratio_rule_as_the_paper_says() -> None:
    counts = first_tokens("ratio", "global")
    assert abs(float(counts[A]) / DRAWS - 0.85) < 0.005
    assert p_value(counts, P) < 1e-12


@pytest.mark.parametrize(
    ("rule", "scheduler"),
    [
        ("ratio", "early_stop"),
        ("ratio", "asynchronous"),
        ("ratio", "threshold"),
        ("ratio", "fixed"),
        ("coupled", "global"),
    ],
)
def test_exact_pairs_of_rule_and_schedule(rule: str, scheduler: str) -> None:
    counts = first_tokens(rule, scheduler)
    assert abs(float(counts[A]) / DRAWS - 0.7) < 0.005
    assert p_value(counts, P) > 1e-4


def test_the_schedules_differ_as_the_paper_says() -> None:
    """Look-ahead verifies both tokens after A; the causal search verifies none, as one does not pay."""
    confident = torch.tensor([[0.8, 0.9]])
    assert make_scheduler("global").lengths(confident, PaperCost()).tolist() == [2]
    assert make_scheduler("early_stop").lengths(confident, PaperCost()).tolist() == [0]
    assert make_scheduler("global").lengths(torch.tensor([[0.8, 0.0]]), PaperCost()).tolist() == [0]
