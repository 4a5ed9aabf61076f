"""The prefix scheduler maximises tokens per second over whole prefixes."""

from __future__ import annotations

import collections
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.scheduler import best, filled, make_scheduler, ranked, rates, spread
from pipeline.decoding.step_cost import StepCost, kept, measure, padded
from pipeline.errors import ConfigError


class Table:
    """Seconds of one, two, ... tokens, and how often it was asked."""

    def __init__(self, *seconds: float) -> None:
        self.table, self.asked = np.array(seconds), 0

    def rounds(self, tokens: np.ndarray, context: int) -> np.ndarray:
        self.asked += 1
        return self.table[tokens - 1]


def _rate(confidence: list[list[float]], lengths: tuple[int, ...], cost: Table) -> float:
    emitted = float(len(lengths))
    for row, n in zip(confidence, lengths, strict=True):
        survival = 1.0
        for c in row[:n]:
            survival *= c
            emitted += survival
    return emitted / float(cost.table[len(lengths) + sum(lengths) - 1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3), min_size=1, max_size=3),
    st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12),
)
def test_global_search_finds_the_best_prefixes(confidence: list[list[float]], steps: list[float]) -> None:
    cost = Table(*itertools.accumulate(steps, initial=1.0))
    lengths = make_scheduler("global").lengths(torch.tensor(confidence, dtype=torch.float64), cost)
    most = max(_rate(confidence, c, cost) for c in itertools.product(range(4), repeat=len(confidence)))
    assert _rate(confidence, tuple(lengths.tolist()), cost) == pytest.approx(most)


@settings(max_examples=200, deadline=None)
@given(
    # Few values, so that rates tie.
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.7, 1.0]), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=15, max_size=15),
)
def test_the_search_is_that_of_token_after_token(confidence: list[list[float]], steps: list[float]) -> None:
    requests, seconds = len(confidence), list(itertools.accumulate(steps, initial=1.0))
    order = ranked(torch.tensor(confidence))
    for stop in (False, True):
        emitted, found, fastest = float(requests), 0, requests / seconds[requests - 1]
        for count, (negative, _, _) in enumerate(order, start=1):
            emitted -= negative
            rate = emitted / seconds[requests + count - 1]
            if rate > fastest:
                fastest, found = rate, count
            elif stop:
                break
        assert best(rates(order, requests, Table(*seconds), 0), stop=stop) == found


@pytest.mark.parametrize("name", ["global", "early_stop", "asynchronous"])
def test_a_step_s_costs_are_asked_for_once(name: str) -> None:
    scheduler, cost = make_scheduler(name), Table(*[1.0] * 512)
    for step in range(1, 4):
        assert scheduler.lengths(torch.full((64, 7), 0.9), cost).tolist() == [7] * 64
        assert cost.asked == step


def test_early_stop_stops_at_the_first_token_that_does_not_pay() -> None:
    confidence = torch.tensor([[0.9, 0.1, 0.9]])
    assert make_scheduler("early_stop").lengths(confidence, Table(1.0, 1.1, 2.0, 2.0)).tolist() == [1]


def test_a_costly_step_means_plain_decoding() -> None:
    assert make_scheduler("global").lengths(torch.full((4, 3), 0.9), Table(*range(1, 20))).tolist() == [0, 0, 0, 0]


def test_limits_hold() -> None:
    flat = Table(*[1.0] * 20)
    limits = torch.tensor([0, 2, -1])
    for name in ("global", "early_stop", "asynchronous", "threshold", "fixed"):
        assert make_scheduler(name).lengths(torch.full((3, 3), 0.9), flat, 0, limits).tolist() == [0, 2, 0]


def test_the_asynchronous_budget_is_that_of_two_steps_before() -> None:
    """A dear second token stops early_stop; the whole search steps over it, and its budget comes into force later."""
    cost = Table(1.0, 1.9, 1.95, 2.0, *[9.0] * 20)
    likely, unlikely = torch.tensor([[0.8, 0.8, 0.8]]), torch.tensor([[0.1, 0.1, 0.1]])
    budget = make_scheduler("global").lengths(likely, cost).tolist()
    assert budget == [3] and make_scheduler("early_stop").lengths(likely, cost).tolist() == [0]
    scheduler = make_scheduler("asynchronous")
    seen = [scheduler.lengths(c, cost).tolist() for c in (likely, likely, unlikely, unlikely, likely, likely)]
    assert seen == [[0], [0], [3], [3], [0], [0]]


def test_the_asynchronous_budget_follows_the_number_of_requests() -> None:
    flat = Table(*[1.0] * 40)
    scheduler = make_scheduler("asynchronous")
    two = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    for _ in range(2):
        assert scheduler.lengths(two, flat).tolist() == [2, 2]
    assert scheduler.lengths(two[:1], flat).tolist() == [2]
    assert scheduler.lengths(two.repeat(3, 1), flat).tolist() == [2] * 6


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["early_stop", "asynchronous", "threshold"]),
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=2, max_size=2),
    st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8),
    st.integers(0, 1),
    st.integers(0, 2),
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
    st.sampled_from([(), (4,), (3, 5, 8)]),
)
def test_a_causal_schedule_does_not_see_what_it_decides_on(
    name: str,
    confidence: list[list[float]],
    steps: list[float],
    b: int,
    k: int,
    others: list[float],
    buckets: tuple[int, ...],
) -> None:
    """Whether token k is verified stays the same whatever the confidences after k, which are all that saw token k."""
    cost = Table(*itertools.accumulate(steps, initial=1.0))
    changed = [list(row) for row in confidence]
    changed[b][k + 1 :] = others[k + 1 :]
    chosen = []
    for rows in (confidence, changed):
        scheduler = make_scheduler(name, threshold=0.4)
        for _ in range(2):
            scheduler.lengths(torch.tensor([[0.9, 0.5, 0.3], [0.6, 0.6, 0.1]]), cost)
        confidences = torch.tensor(rows, dtype=torch.float64)
        chosen.append(int(scheduler.lengths(confidences, cost, buckets=buckets)[b]) > k)
    assert chosen[0] == chosen[1]


def test_look_ahead_sees_what_it_decides_on() -> None:
    """What the property above would find: token 0 is verified for the sake of token 1, which saw it."""
    cost = Table(1.0, 1.9, 1.95)
    chosen = [make_scheduler("global").lengths(torch.tensor([[0.8, c]]), cost).tolist() for c in (0.9, 0.0)]
    assert chosen == [[2], [0]]


@pytest.mark.parametrize(
    ("count", "available", "requests", "buckets", "takes"),
    [
        (3, 9, 2, (), 3),  # nothing is padded
        (3, 9, 2, (4, 8, 16), 6),  # 5 tokens run as 8
        (3, 5, 2, (4, 8, 16), 5),  # and no more are left
        (6, 9, 2, (4, 8, 16), 6),  # full as it is
        (0, 9, 2, (4, 8), 2),  # plain steps too are padded
        (9, 20, 2, (4, 8), 9),  # beyond the largest
    ],
)
def test_a_bucket_is_filled(count: int, available: int, requests: int, buckets: tuple[int, ...], takes: int) -> None:
    assert filled(count, available, requests, buckets) == takes


def test_the_likeliest_tokens_fill_a_bucket() -> None:
    confidence = torch.tensor([[0.9, 0.2, 0.9], [0.9, 0.5, 0.5]])
    cost = Table(1.0, 1.0, 1.1, 1.2, 9.0, 9.0, 9.0, 9.0)
    for name, chosen in (("global", [1, 1]), ("early_stop", [1, 1]), ("asynchronous", [1, 1])):
        assert make_scheduler(name).lengths(confidence, cost).tolist() == chosen
        assert make_scheduler(name).lengths(confidence, cost, buckets=(4,)).tolist() == chosen
        assert make_scheduler(name).lengths(confidence, cost, buckets=(6,)).tolist() == [1, 3]
        assert make_scheduler(name).lengths(confidence, cost, 0, torch.tensor([3, 1]), (6,)).tolist() == [3, 1]
    assert make_scheduler("threshold", threshold=0.8).lengths(confidence, cost, buckets=(6,)).tolist() == [1, 3]
    assert make_scheduler("fixed", 1).lengths(confidence, cost, buckets=(6,)).tolist() == [1, 1]


def test_threshold_verifies_what_is_likely_enough_to_be_emitted() -> None:
    confidence = torch.tensor([[0.9, 0.9, 0.4], [0.4, 1.0, 1.0], [1.0, 1.0, 0.5]])
    assert make_scheduler("threshold", threshold=0.5).lengths(confidence, Table()).tolist() == [2, 0, 3]
    with pytest.raises(ConfigError, match="engine.threshold=0 "):
        make_scheduler("threshold", threshold=0)


def test_an_unknown_scheduler_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'asynchronous'"):
        make_scheduler("asynchronus")


def test_step_cost_interpolates_and_extrapolates() -> None:
    cost = measure(lambda tokens, context: tokens * 1.0 + context / 100, [1, 4, 8], [0, 128], repeats=3)
    assert cost.seconds(2, 0) == pytest.approx(2.0)
    assert cost.seconds(4, 64) == pytest.approx(4.64)
    assert cost.seconds(16, 0) == pytest.approx(16.0)


def test_step_costs_reach_far_contexts_by_a_few_measurements() -> None:
    runs: collections.Counter[int] = collections.Counter()

    def run(tokens: int, context: int) -> float:
        runs[context] += 1
        return 1.0 + 0.1 * tokens + 1e-4 * tokens * context

    cost = measure(run, [1, 2, 4, 8, 16], [64, 512], far=[2048, 4000])
    assert cost.contexts == [64, 512, 2048, 4000]
    for tokens in (1, 2, 8, 16, 20):
        for context in (512, 1000, 2048, 4000):
            assert cost.seconds(tokens, context) == pytest.approx(run(tokens, context))
    assert cost.seconds(4, 9999) == pytest.approx(run(4, 4000))
    assert runs[2048] < runs[512] / 2


def test_a_disturbed_measurement_does_not_make_a_step_dear() -> None:
    """Two of eight measurements of a point, and a step that really is dearer than larger ones."""
    runs: collections.Counter[int] = collections.Counter()

    def run(tokens: int, _: int) -> float:
        runs[tokens] += 1
        return 0.05 + 0.001 * tokens + 0.01 * (tokens == 2) + 0.03 * (runs[tokens] in (3, 6))

    cost = measure(run, [1, 2, 4, 8], [0])
    assert [cost.seconds(t, 0) for t in (1, 2, 4, 8)] == pytest.approx([0.051, 0.062, 0.054, 0.058])
    # The look-ahead search steps over the dear size.
    likely = torch.tensor([[0.6, 0.5, 0.5]])
    assert make_scheduler("global").lengths(likely, cost).tolist() == [3]
    assert make_scheduler("global").lengths(torch.tensor([[0.6, 0.01, 0.01]]), Table(1, 1.5, 1.05, 2)).tolist() == [2]


def test_step_costs_follow_the_machine() -> None:
    cost = StepCost([1, 2, 4, 8], [0, 512], [[1.0, 1.0] for _ in range(4)])

    def real(tokens: int, context: int) -> float:
        return 1.5 + 0.1 * tokens + context / 512

    chance = random.Random(0)
    for _ in range(4000):
        tokens, context = chance.choice((1, 3, 5, 8)), chance.choice((0, 100, 300, 512))
        cost.observe(tokens, context, real(tokens, context) * (9 if chance.random() < 0.01 else 1))
    for tokens in (1, 4, 8):
        for context in (0, 512):
            assert cost.seconds(tokens, context) == pytest.approx(real(tokens, context), rel=0.05)
    kept = cost.copy()
    cost.observe(4, 0, 100.0)
    assert cost.seconds(4, 0) <= kept.seconds(4, 0) * 1.06, "one hiccup hardly counts"
    assert cost.seconds(4, 0) > kept.seconds(4, 0), "a copy learns apart"


HERE = {"hardware": "a CPU", "threads": 2, "dtype": "float32", "target": "tiny"}


def test_step_costs_are_kept_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs" / "here.json"
    measured = StepCost([1, 8], [64], [[0.5], [1.0]])
    assert kept(path, HERE, (8, 64), lambda: measured) is measured
    assert [p.name for p in path.parent.iterdir()] == ["here.json"], "what was written aside is gone"
    found = kept(path, HERE, (8, 64), lambda: pytest.fail("it was measured again"))
    assert found == measured and not caplog.records
    content = json.loads(path.read_text())
    assert content["made_for"] == HERE and len(content["digest"]) == 64


@pytest.mark.parametrize(
    ("spoil", "made_for", "reach", "says"),
    [
        (lambda p: None, {**HERE, "threads": 4}, (8, 64), "threads is 2 there and 4 here"),
        (lambda p: None, {**HERE, "target": "other"}, (8, 64), "target is 'tiny' there and 'other' here"),
        (lambda p: None, HERE, (16, 64), "it ends at 8 tokens in a step, this engine's goes up to 16"),
        (lambda p: None, HERE, (8, 512), "it ends at 64 tokens of context"),
        (lambda p: p.write_text(p.read_text().replace("0.5", "0.4")), HERE, (8, 64), "its digest differs"),
        (lambda p: p.write_text("{"), HERE, (8, 64), "it is no step cost file (JSONDecodeError"),
        (lambda p: p.write_text("[1]"), HERE, (8, 64), "it is no step cost file"),
    ],
)
def test_a_file_of_step_costs_that_does_not_fit_is_said_and_replaced(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Any,
    made_for: dict[str, Any],
    reach: tuple[int, int],
    says: str,
) -> None:
    path = tmp_path / "costs.json"
    kept(path, HERE, (8, 64), lambda: StepCost([1, 8], [64], [[0.5], [1.0]]))
    spoil(path)
    other = StepCost([1, 16], [512], [[2.0], [3.0]])
    assert kept(path, made_for, reach, lambda: other) is other
    assert says in caplog.text and str(path) in caplog.text
    assert kept(path, made_for, reach, lambda: pytest.fail("it was measured again")) == other


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_are_spread_on_the_device_as_on_the_host(data: st.DataObject) -> None:
    """The same prefixes, ties and NaN included."""
    requests, block = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    known = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.9, 1.0, float("nan")])
    confidence = torch.tensor([[data.draw(known) for _ in range(block)] for _ in range(requests)])
    limits = torch.tensor([data.draw(st.integers(0, block)) for _ in range(requests)])
    count = data.draw(st.integers(0, int(limits.sum())))
    order = ranked(confidence.nan_to_num(0.0), limits)
    expected = [0] * requests
    for _, k, b in order[:count]:
        expected[b] = k + 1
    assert spread(confidence, limits, count).tolist() == expected


def test_what_is_foreseen_is_what_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = StepCost([1, 4, 8, 16], [0], [[1.0], [1.1], [1.5], [2.0]])
    one, two = make_scheduler("asynchronous"), make_scheduler("asynchronous")
    for step in range(20):
        confidence = torch.rand(3, 5, generator=generator)
        limits = torch.tensor([5, 2, 4])
        foreseen = one.foreseen(limits.tolist(), (4, 9))
        lengths = two.lengths(confidence, cost, 0, limits, (4, 9))
        if step < 2:
            assert foreseen is None
            one.lengths(confidence, cost, 0, limits, (4, 9))
        else:
            assert isinstance(foreseen, int) and foreseen == int(lengths.sum())
            assert spread(confidence, limits, foreseen).tolist() == lengths.tolist()
            one.learn(confidence, cost, 0, limits)
    assert make_scheduler("fixed", 3).foreseen([5, 2, 0]) == [3, 2, 0]
    assert [make_scheduler(n).foreseen([5, 2]) for n in ("global", "early_stop", "threshold")] == [None] * 3


def test_a_padded_step_costs_what_it_is_run_as() -> None:
    cost = StepCost([1, 4, 8, 16], [0], [[1.0], [1.1], [1.5], [2.0]])
    sizes = np.array([1, 2, 4, 5, 8, 9, 20])
    as_run = cost.rounds(np.array([4, 4, 4, 8, 8, 9, 20]), 0)
    assert padded(cost, (4, 8)).rounds(sizes, 0).tolist() == as_run.tolist()
    assert padded(cost, ()) is cost
