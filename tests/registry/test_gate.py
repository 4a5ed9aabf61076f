"""The gate: who may become champion, and why not."""

from __future__ import annotations

import math

import pytest

from pipeline.errors import DraftlineError
from pipeline.registry.gate import PromotionRefused, decide
from tests.registry.reports import TARGET, Policy, report

STRICT = Policy(min_tau=2.0)


def failed(decision) -> list[str]:
    return [c.name for c in decision.failed]


def test_a_first_draft_that_is_exact_and_faster_is_promoted():
    decision = decide(report(), None, Policy())
    assert decision.verdict == "promote"
    assert failed(decision) == []
    assert {c.name for c in decision.reasons} == {"exact_greedy", "speedup_low"}
    decision.require()


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (report(exact_greedy=False), "exact_greedy"),
        (report(exact_greedy="yes"), "exact_greedy"),
        (report(speedup=1.02, low=1.0, high=1.1), "speedup_low"),
        (report(speedup_low=math.nan), "speedup_low"),
        (report(tau=1.99), "tau"),
    ],
)
def test_each_bound_refuses_by_itself(candidate, reason):
    decision = decide(candidate, None, STRICT)
    assert decision.verdict == "refuse"
    assert failed(decision) == [reason]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (report(target={**TARGET, "revision": "r2"}), "target.revision"),
        (report(target={**TARGET, "weight_digest": "x"}), "target.weight_digest"),
        (report(target={**TARGET, "tokenizer_digest": "x"}), "target.tokenizer_digest"),
        (report(evaluation_set_digest="other"), "evaluation_set"),
        (report(speedup=1.40, low=1.36, high=1.44), "speedup_ratio_low"),
        # The same point estimate, but measured so loosely that it can't show that nothing was lost.
        (report(low=1.1, high=1.9), "speedup_ratio_low"),
        (report(speedup_high=math.inf), "speedup_ratio_low"),
    ],
)
def test_each_comparison_with_the_champion_refuses_by_itself(candidate, reason):
    decision = decide(candidate, report(), STRICT)
    assert decision.verdict == "refuse"
    assert failed(decision) == [reason]


def test_an_equal_draft_measured_well_replaces_the_champion():
    decision = decide(report(), report(), Policy())
    assert decision.verdict == "promote"


def test_the_ratio_interval_is_that_of_two_independent_measurements():
    decision = decide(report(2.0, 1.8, 2.2), report(1.0, 0.9, 1.1), Policy(max_regression=0.0))
    check = next(c for c in decision.reasons if c.name == "speedup_ratio_low")
    assert check.value == pytest.approx(2.0 * math.exp(-math.hypot(math.log(2.0 / 1.8), math.log(1.1))))


def test_exactness_can_be_waived_and_is_still_shown():
    decision = decide(report(exact_greedy=False), None, Policy(require_exact_greedy=False))
    assert decision.promoted
    assert decision.reasons[0].value is False


def test_the_table_and_the_refusal_show_every_number():
    decision = decide(report(speedup=1.3, low=0.97, high=1.6), report(), STRICT)
    table = decision.table()
    for part in ("verdict: refuse", "exact_greedy", "0.97", "> 1", "FAILED", "2.3", ">= 2", "1.300 [0.970, 1.600]"):
        assert part in table
    with pytest.raises(PromotionRefused, match="speedup_low") as e:
        decision.require()
    assert table in str(e.value)


@pytest.mark.parametrize("field", ["exact_greedy", "headline", "target", "evaluation_set_digest"])
def test_a_report_without_a_field_names_it(field):
    with pytest.raises(DraftlineError, match=field):
        decide(report(**{field: None}), report(), Policy())


@pytest.mark.parametrize("value", ["fast", True, None])
def test_a_speedup_that_is_not_a_number_is_named(value):
    with pytest.raises(DraftlineError, match="speedup_low"):
        decide(report(speedup_low=value), None, Policy())


def test_the_gate_needs_no_mlflow():
    import subprocess
    import sys

    code = "import sys, pipeline.registry.gate; sys.exit(any(m in sys.modules for m in ('mlflow', 'ray', 'hydra')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
