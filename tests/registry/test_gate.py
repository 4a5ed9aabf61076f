"""The gate: who may become champion, and why not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.errors import DraftlineError
from pipeline.registry.gate import PromotionRefused, decide
from tests.registry.reports import TARGET, Policy, comparison, report

STRICT = Policy(min_tau=2.0)


def failed(decision) -> list[str]:
    return [c.name for c in decision.failed]


def test_a_first_draft_that_is_exact_and_faster_is_promoted():
    decision = decide(report(), Policy())
    assert decision.verdict == "promote"
    assert failed(decision) == []
    assert {c.name for c in decision.reasons} == {"exact_greedy", "prompts", "speedup_low"}
    decision.require()


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (report(exact_greedy=False), "exact_greedy"),
        (report(exact_greedy="yes"), "exact_greedy"),
        (report(speedup=1.02, low=1.0, high=1.1), "speedup_low"),
        (report(speedup_low=math.nan), "speedup_low"),
        (report(tau=1.99), "tau"),
        # One prompt's interval has no width: it would pass any bound below its value.
        (report(speedup=1.5, low=1.5, high=1.5, prompts=1), "prompts"),
    ],
)
def test_each_bound_refuses_by_itself(candidate, reason):
    decision = decide(candidate, STRICT)
    assert decision.verdict == "refuse"
    assert failed(decision) == [reason]


@pytest.mark.parametrize(
    ("candidate", "compared", "reason"),
    [
        (report(target={**TARGET, "revision": "r2"}), None, "target.revision"),
        (report(target={**TARGET, "weight_digest": "x"}), None, "target.weight_digest"),
        (report(target={**TARGET, "tokenizer_digest": "x"}), None, "target.tokenizer_digest"),
        (report(), comparison(0.9, 0.88, 0.93), "over_champion_low"),
        # The same point estimate, but measured so loosely that it can't show that nothing was lost.
        (report(), comparison(1.0, 0.8, 1.2), "over_champion_low"),
        (report(), comparison(math.nan, math.nan, math.nan), "over_champion_low"),
    ],
)
def test_each_comparison_with_the_champion_refuses_by_itself(candidate, compared, reason):
    decision = decide(candidate, STRICT, champion_target=TARGET, comparison=compared)
    assert decision.verdict == "refuse"
    assert failed(decision) == [reason]


def test_an_equal_draft_measured_well_replaces_the_champion():
    assert decide(report(), Policy(), champion_target=TARGET, comparison=comparison()).promoted
    moved = report(target={**TARGET, "id": "copy"})
    assert decide(moved, Policy(), champion_target=TARGET, comparison=comparison()).promoted


def test_a_refusal_says_what_to_do():
    loose = decide(report(), STRICT, champion_target=TARGET, comparison=comparison(1.0, 0.8, 1.2)).text()
    assert "16 prompts can't tell" in loose
    assert "benchmark.prompts" in loose
    slower = decide(report(), STRICT, champion_target=TARGET, comparison=comparison(0.9, 0.88, 0.93)).text()
    assert "Train a better draft" in slower
    other = decide(report(target={**TARGET, "revision": "r2"}), STRICT, champion_target=TARGET).text()
    assert "tracking.model_name" in other


def test_a_comparison_of_another_draft_is_no_evidence():
    with pytest.raises(DraftlineError, match="not the challenger"):
        decide(report(), STRICT, champion_target=TARGET, comparison=comparison(draft="x" * 64))


def test_exactness_can_be_waived_and_is_still_shown():
    decision = decide(report(exact_greedy=False), Policy(require_exact_greedy=False))
    assert decision.promoted
    assert decision.reasons[0].value is False


def test_the_table_and_the_refusal_show_every_number():
    decision = decide(report(speedup=1.3, low=0.97, high=1.6), STRICT)
    table = decision.table()
    for part in ("verdict: refuse", "exact_greedy", "0.97", "> 1", "FAILED", "2.3", ">= 2", "1.300 [0.970, 1.600]"):
        assert part in table
    with pytest.raises(PromotionRefused, match="speedup_low") as e:
        decision.require()
    assert table in str(e.value)


@pytest.mark.parametrize("field", ["exact_greedy", "headline", "target", "draft_digest"])
def test_a_report_without_a_field_names_it(field):
    with pytest.raises(DraftlineError, match=field):
        decide(report(**{field: None}), Policy(), champion_target=TARGET, comparison=comparison())


@pytest.mark.parametrize("value", ["fast", True, None])
def test_a_speedup_that_is_not_a_number_is_named(value):
    with pytest.raises(DraftlineError, match="speedup_low"):
        decide(report(speedup_low=value), Policy())


def test_the_gate_needs_no_mlflow():
    import subprocess
    import sys

    code = "import sys, pipeline.registry.gate; sys.exit(any(m in sys.modules for m in ('mlflow', 'ray', 'hydra')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_tables_are_the_gates_own():
    page = (Path(__file__).resolve().parents[2] / "docs" / "registry.md").read_text()
    refused = decide(
        report(1.44, 1.38, 1.5), Policy(), champion_target=TARGET, comparison=comparison(0.947, 0.921, 0.974)
    )
    for decision in (decide(report(1.52, 1.47, 1.57), Policy()), refused):
        assert decision.text() in page
