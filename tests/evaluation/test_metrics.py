"""The report's numbers against slow, obvious computations of the same."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.decoding.request import RequestMetrics
from pipeline.evaluation.metrics import auc, bootstrap, ece, positions, reliability, speedup, summed, totals, wilson


@pytest.mark.parametrize(("hits", "tries"), [(0, 7), (7, 7), (3, 10), (480, 1000)])
def test_wilson_is_scipys(hits: int, tries: int) -> None:
    reference = binomtest(hits, tries).proportion_ci(0.95, method="wilson")
    assert wilson(hits, tries) == pytest.approx((reference.low, reference.high), abs=1e-4)


def test_a_position_never_reached_says_that_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_positions_follow_from_rounds() -> None:
    rounds = [(4, 2), (4, 4), (2, 2), (0, 0), (3, 0), (4, 1)]
    metrics = RequestMetrics()
    for length, accepted in rounds:
        metrics.record_round(length, accepted, accepted + 1)
    got = positions(metrics.offered, metrics.accepted_at)
    survival = 1.0
    for k, entry in enumerate(got):
        reached = [a for length, a in rounds if length > k and a >= k]
        held = [a for a in reached if a > k]
        survival *= len(held) / len(reached)
        assert (entry["offered"], entry["accepted"]) == (len(reached), len(held))
        assert entry["acceptance"] == pytest.approx(len(held) / len(reached))
        assert entry["survival"] == pytest.approx(survival)
        assert entry["low"] <= entry["acceptance"] <= entry["high"]


def test_a_text_that_ends_inside_a_block_counts_up_to_its_end() -> None:
    """Five verified, five right, but the second was the stop token: nothing behind it was tried."""
    metrics = RequestMetrics()
    metrics.record_round(5, 5, emitted=2)
    assert (metrics.verified, metrics.accepted) == (5, 2)
    assert metrics.offered == [1, 1, 0, 0, 0] and metrics.accepted_at == [1, 1, 0, 0, 0]


def test_tau_counts_the_bonus_token_and_leaves_the_prefills_token_out() -> None:
    # Three decoding steps that emitted 3, 1 and 4 tokens.
    assert RequestMetrics(target_steps=3, decoded=8).tau == pytest.approx(8 / 3)


def test_ece_is_the_weighted_gap_of_the_bins() -> None:
    generator = np.random.default_rng(0)
    predicted, observed = generator.random(500), (generator.random(500) < 0.4).astype(float)
    gap = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(predicted) if min(int(p * 10), 9) == b]
        if inside:
            gap += abs(sum(predicted[i] for i in inside) - sum(observed[i] for i in inside))
    assert ece(predicted, observed) == pytest.approx(gap / 500)
    assert sum(b["count"] for b in reliability(predicted, observed)) == 500


def test_a_probability_of_one_falls_into_the_last_bin() -> None:
    assert ece(np.ones(4), np.ones(4)) == 0.0


def test_auc_counts_pairs_and_halves_ties() -> None:
    score, observed = np.array([0.1, 0.4, 0.4, 0.8, 0.9]), np.array([0, 0, 1, 0, 1])
    pairs = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for (s, o), (t, p) in itertools.product(zip(score, observed, strict=True), repeat=2)
        if o == 1 and p == 0
    ]
    assert auc(score, observed) == pytest.approx(statistics.mean(pairs))


def test_auc_of_one_outcome_is_not_a_number_made_up() -> None:
    assert auc(np.array([0.2, 0.7]), np.array([1, 1])) is None


def test_the_headline_is_the_median_of_paired_ratios() -> None:
    got = speedup([20.0, 30.0, 80.0], [10.0, 10.0, 10.0], 500, 0)
    assert got["speedup"] == 3.0
    assert 2.0 <= got["low"] <= 3.0 <= got["high"] <= 8.0


def test_totals_weigh_prompts_by_their_tokens() -> None:
    tokens, seconds, base_tokens, base_seconds = [10.0, 90.0], [1.0, 3.0], [10.0, 90.0], [1.0, 9.0]
    got = totals(tokens, seconds, base_tokens, base_seconds, 400, 0)
    assert got["totals"] == pytest.approx((100 / 4) / (100 / 10))
    # The two prompts alone are 1x and 3x: those are the ends of what resampling can give.
    assert got["totals_low"] == pytest.approx(1.0)
    assert got["totals_high"] == pytest.approx(3.0)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    value, low, high = bootstrap(values.tolist(), lambda x: float(x.mean()), 2000, 0)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == (pytest.approx(value - half, abs=0.05), pytest.approx(value + half, abs=0.05))


def test_an_interval_is_the_same_again() -> None:
    assert speedup([2.0, 3.0, 5.0], [1.0, 1.0, 2.0], 100, 7) == speedup([2.0, 3.0, 5.0], [1.0, 1.0, 2.0], 100, 7)


def test_lists_of_different_lengths_add_up() -> None:
    assert summed([[3, 2, 1], [1], []]) == [4, 2, 1]
    assert summed([]) == []
