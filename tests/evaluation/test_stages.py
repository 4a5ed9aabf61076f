"""Calibrating and evaluating a draft, end to end on a tiny target."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import artifact
from pipeline.corpus.build import read_rows
from pipeline.decoding import Completion, verification
from pipeline.decoding.request import RequestMetrics
from pipeline.drafts.checkpoint import load_draft
from pipeline.errors import DraftlineError
from pipeline.evaluation import stages
from pipeline.evaluation.benchmark import Arm, pick_prompts, report_arms, summarise
from pipeline.evaluation.report import render
from pipeline.evaluation.stages import calibrate_draft, compare_drafts, evaluate_draft
from pipeline.registry.gate import decide
from pipeline.target import load_target, obtain
from tests.evaluation.conftest import BENCHMARK, ENGINE, TARGET, Places
from tests.registry.reports import Policy


@dataclasses.dataclass(frozen=True)
class Evaluated:
    calibrated: Path
    report: Path
    content: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def evaluated(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root = tmp_path_factory.mktemp("stages")
    calibrated, report = root / "calibrated", root / "report"
    calibrate_draft(places.draft, TARGET, places.corpus, ENGINE, BENCHMARK, calibrated, places.cache)
    evaluate_draft(calibrated, TARGET, places.corpus, ENGINE, BENCHMARK, report, places.cache)
    content = json.loads((report / "report.json").read_text())
    return Evaluated(calibrated, report, content, (report / "report.html").read_text())


def test_the_calibrated_draft_carries_its_temperatures(places: Places, evaluated: Evaluated) -> None:
    manifest = artifact.load(evaluated.calibrated, "draft")
    fitted = manifest.info["calibration"]
    assert manifest.info["steps"] == 0
    assert manifest.inputs["draft"] == artifact.load(places.draft, "draft").digest
    assert fitted["rounds"] > 0
    loaded = load_draft(evaluated.calibrated, load_target(TARGET, places.cache))
    assert loaded.temperatures.tolist() == pytest.approx(fitted["temperatures"], abs=1e-3)


def test_a_draft_that_was_not_calibrated_is_called_so(evaluated: Evaluated) -> None:
    assert "not\ncalibrated" in render({**evaluated.content, "calibration_rounds": 0})
    assert "not\ncalibrated" not in evaluated.page


def test_a_random_draft_changes_no_text(evaluated: Evaluated) -> None:
    assert evaluated.content["exact_greedy"] is True
    assert evaluated.content["exact_sampled"] is True
    for name in ("ngram", "draft", "draft fixed", "draft t1"):
        assert evaluated.content["arms"][name]["same_text"] == BENCHMARK.prompts


def test_every_arm_is_there_with_an_interval_around_its_speedup(evaluated: Evaluated) -> None:
    assert set(evaluated.content["arms"]) == {a.name for a in report_arms(ENGINE)}
    for arm in evaluated.content["arms"].values():
        assert 0 < arm["low"] <= arm["speedup"] <= arm["high"]
        assert arm["totals_low"] <= arm["totals"] <= arm["totals_high"]
        assert arm["tau"] >= 1
    plain = evaluated.content["arms"]["none"]
    assert (plain["speedup"], plain["low"], plain["high"], plain["tau"]) == (1, 1, 1, 1)


def test_what_is_measured_and_compared_is_what_is_served(
    evaluated: Evaluated, places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    arms = evaluated.content["arms"]
    assert {(arms[n]["scheduler"], arms[n]["rule"]) for n in ("draft", "draft t1")} == {("global", "coupled")}
    assert "draft t1 coupled" not in arms
    served = dataclasses.replace(ENGINE, scheduler="threshold", rule="ratio")
    out = tmp_path / "report"
    evaluate_draft(evaluated.calibrated, TARGET, places.corpus, served, BENCHMARK, out, places.cache)
    content = json.loads((out / "report.json").read_text())
    arms = content["arms"]
    assert {(arms[n]["scheduler"], arms[n]["rule"]) for n in ("draft", "draft t1")} == {("threshold", "ratio")}
    assert content["headline"].keys() == evaluated.content["headline"].keys()
    assert content["headline"]["speedup_t1"] == arms["draft t1"]["speedup"]
    # The ratio rule's text is its own, and no fault: what a seed gives by the coupled one is measured beside it.
    assert arms["draft t1 coupled"]["rule"] == "coupled" and arms["draft t1 coupled"]["same_text"] == BENCHMARK.prompts
    assert content["exact_greedy"] is content["exact_sampled"] is True
    assert "scheduler\nthreshold, rule ratio" in (out / "report.html").read_text()

    def asked(_engine: Any, arms: tuple[Arm, ...], *_: Any) -> None:
        assert [(a.name, a.scheduler, a.rule) for a in arms] == [
            ("challenger", "threshold", "ratio"),
            ("champion", "threshold", "ratio"),
        ]
        raise DraftlineError("far enough")

    monkeypatch.setattr(stages, "run_arms", asked)
    rest = (TARGET, places.corpus, served, BENCHMARK, tmp_path / "comparison", places.cache)
    with pytest.raises(DraftlineError, match="far enough"):
        compare_drafts(evaluated.calibrated, places.draft, *rest)


def test_the_gate_reads_the_report(evaluated: Evaluated) -> None:
    manifest = artifact.load(evaluated.calibrated, "draft")
    assert evaluated.content["target"] == manifest.target
    assert evaluated.content["draft_digest"] == manifest.digest
    assert decide(evaluated.content, Policy(min_speedup_low=0.0, min_prompts=1)).promoted


def test_two_drafts_are_measured_side_by_side_once(
    evaluated: Evaluated, places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "comparison"
    rest = (TARGET, places.corpus, ENGINE, BENCHMARK, out, places.cache)
    content = compare_drafts(evaluated.calibrated, places.draft, *rest)
    assert content["challenger"]["draft_digest"] == artifact.load(evaluated.calibrated, "draft").digest
    assert content["champion"]["draft_digest"] == artifact.load(places.draft, "draft").digest
    assert content["prompts"] == BENCHMARK.prompts
    assert content["low"] <= content["ratio"] <= content["high"]
    speeds = [content[side]["tokens_per_second"] for side in ("challenger", "champion")]
    assert content["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=1e-3)
    policy = Policy(min_speedup_low=0.0, min_prompts=1, max_regression=1.0)
    target = artifact.load(places.draft, "draft").target
    assert decide(evaluated.content, policy, champion_target=target, comparison=content).promoted
    monkeypatch.setattr(stages, "load_target", lambda *_: pytest.fail("measured again"))
    assert compare_drafts(evaluated.calibrated, places.draft, *rest) == content


def test_the_page_shows_every_part_and_asks_the_network_for_nothing(evaluated: Evaluated) -> None:
    page = evaluated.page
    for part in (
        "Arms",
        "Calibration by position",
        "By source",
        "Provenance",
        "Calibration error",
        "verified per round",
        "Speedup over plain",
    ):
        assert part in page
    for arm in report_arms(ENGINE):
        assert f"<td>{arm.name}</td>" in page
    for source in {p["source"] for p in evaluated.content["arms"]["draft"]["per_prompt"]}:
        assert f"<td>{source}</td>" in page
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert not re.findall(r"url\((?!#)|@import", page)


def test_a_differing_token_is_caught_and_shown(
    evaluated: Evaluated, places: Places, monkeypatch: Any, tmp_path: Path
) -> None:
    def tampered(done: dict[str, list[Any]], *rest: Any) -> dict[str, Any]:
        ids = done["draft fixed"][1].token_ids
        ids[-1] = (ids[-1] + 1) % 7
        return summarise(done, *rest)

    monkeypatch.setattr(stages, "summarise", tampered)
    out = tmp_path / "report"
    evaluate_draft(evaluated.calibrated, TARGET, places.corpus, ENGINE, BENCHMARK, out, places.cache)
    content = json.loads((out / "report.json").read_text())
    assert content["exact_greedy"] is False
    assert content["arms"]["draft fixed"]["same_text"] == BENCHMARK.prompts - 1
    assert content["arms"]["draft"]["same_text"] == BENCHMARK.prompts
    assert 'class="bad">NO' in render(content)


def test_a_second_run_measures_nothing(evaluated: Evaluated, places: Places, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the target was loaded again")

    monkeypatch.setattr(stages, "load_target", refuse)
    rest = (TARGET, places.corpus, ENGINE, BENCHMARK)
    again = evaluate_draft(evaluated.calibrated, *rest, evaluated.report, places.cache)
    assert again.info["headline"] == evaluated.content["headline"]
    assert calibrate_draft(places.draft, *rest, evaluated.calibrated, places.cache).kind == "draft"


def test_a_copy_of_the_target_at_another_place_measures_nothing_anew(
    evaluated: Evaluated, places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    copy = shutil.copytree(obtain(TARGET, places.cache), tmp_path / "copy")
    rest = (dataclasses.replace(TARGET, path=str(copy)), places.corpus, ENGINE, BENCHMARK)
    monkeypatch.setattr(stages, "load_target", lambda *_: pytest.fail("the target was loaded again"))
    assert evaluate_draft(evaluated.calibrated, *rest, evaluated.report, places.cache).kind == "report"
    assert calibrate_draft(places.draft, *rest, evaluated.calibrated, places.cache).kind == "draft"
    load_draft(evaluated.calibrated, load_target(rest[0], places.cache))


def test_another_dtype_is_measured_anew(evaluated: Evaluated, places: Places, tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def seen(config: Any, _: Path) -> None:
        asked.append(config.dtype)
        raise DraftlineError("far enough")

    monkeypatch.setattr(stages, "load_target", seen)
    out = shutil.copytree(evaluated.report, tmp_path / "report")
    other = dataclasses.replace(TARGET, dtype="bfloat16")
    with pytest.raises(DraftlineError, match="far enough"):
        evaluate_draft(evaluated.calibrated, other, places.corpus, ENGINE, BENCHMARK, out, places.cache)
    assert asked == ["bfloat16"]


def test_nothing_to_time_is_an_error_and_leaves_no_report(evaluated: Evaluated, places: Places, tmp_path: Path) -> None:
    short = dataclasses.replace(BENCHMARK, max_new_tokens=1)
    out = tmp_path / "report"
    with pytest.raises(DraftlineError, match=r"benchmark\.max_new_tokens \(now 1\)"):
        evaluate_draft(evaluated.calibrated, TARGET, places.corpus, ENGINE, short, out, places.cache)
    assert not out.exists()


def test_too_few_prompts_to_calibrate_on_are_refused_and_fewer_than_asked_are_told(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = len(read_rows(places.corpus, "heldout"))
    rest = (tmp_path / "c", places.cache)
    two = dataclasses.replace(BENCHMARK, calibrate_prompts=2)
    with pytest.raises(DraftlineError, match=r"needs 3 held-out prompts or more and has 2 .*heldout_fraction"):
        calibrate_draft(places.draft, TARGET, places.corpus, ENGINE, two, *rest)
    many = dataclasses.replace(BENCHMARK, calibrate_prompts=there + 9, max_new_tokens=4)
    calibrate_draft(places.draft, TARGET, places.corpus, ENGINE, many, *rest)
    said = capsys.readouterr().out
    assert f"calibrate: {there - 1} held-out prompts, not the {there + 9} of benchmark.calibrate_prompts" in said


def test_more_prompts_to_time_are_none_of_calibrations_and_calibrate_nothing_anew(
    evaluated: Evaluated, places: Places, monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate's remedy for a wide interval: raise benchmark.prompts, evaluate again."""
    rows = read_rows(places.corpus, "heldout")
    mine = {r.sample_id for r in pick_prompts(rows, 4, BENCHMARK.prompts, 0)[0]}
    for prompts in (BENCHMARK.prompts, len(rows) - 5, len(rows), 1000):
        calibration, evaluation = pick_prompts(rows, 4, prompts, 0)
        assert {r.sample_id for r in calibration} == mine
        assert not mine & {r.sample_id for r in evaluation}
        assert len(evaluation) == min(prompts, len(rows) - 4)
    more = dataclasses.replace(BENCHMARK, prompts=1000)
    with monkeypatch.context() as m:
        m.setattr(stages, "load_target", lambda *_: pytest.fail("calibrated again"))
        calibrate_draft(places.draft, TARGET, places.corpus, ENGINE, more, evaluated.calibrated, places.cache)

    def enough(*_: Any) -> None:
        raise DraftlineError("far enough")

    monkeypatch.setattr(stages, "run_arms", enough)
    with pytest.raises(DraftlineError, match="far enough"):
        evaluate_draft(evaluated.calibrated, TARGET, places.corpus, ENGINE, more, tmp_path / "r", places.cache)
    said = f"evaluate: {len(rows) - 4} held-out prompts, not the 1000 of benchmark.prompts"
    out = capsys.readouterr().out
    assert said in out and "and 4 others are calibration's own" in out


def test_prompts_are_disjoint_spread_and_the_same_again(places: Places) -> None:
    rows = read_rows(places.corpus, "heldout")
    calibration, evaluation = pick_prompts(rows, 4, 6, 0)
    names = [{r.sample_id for r in part} for part in (calibration, evaluation)]
    assert (len(names[0]), len(names[1])) == (4, 6)
    assert not names[0] & names[1]
    assert {r.source for r in evaluation} == {"chat", "code", "math"}
    again = pick_prompts(rows[::-1], 4, 6, 0)
    assert [[r.sample_id for r in part] for part in again] == [
        [r.sample_id for r in part] for part in (calibration, evaluation)
    ]


def test_the_acceptance_rate_is_of_what_was_drafted(evaluated: Evaluated) -> None:
    """And what was verified, which a schedule makes less, has a rate of its own name."""
    metrics = RequestMetrics(target_steps=4, decoded=8, drafted=20, verified=8, accepted=4, seconds=2.0, ttft=1.0)
    text = Completion("a", [1, 2], "length", metrics=metrics)
    plain = Completion("a", [1, 2], "length", metrics=RequestMetrics(target_steps=8, decoded=8, seconds=3.0, ttft=1.0))
    rows: list[Any] = [SimpleNamespace(sample_id="a", source="chat")]
    arms = (Arm("none", "none"), Arm("draft", "draft"))
    numbers = summarise({"none": [plain], "draft": [text]}, rows, BENCHMARK, arms)
    assert (numbers["draft"]["accept_rate"], numbers["draft"]["verified_accept_rate"]) == (0.2, 0.5)
    assert (numbers["none"]["accept_rate"], numbers["none"]["verified_accept_rate"]) == (0, 0)
    for arm in evaluated.content["arms"].values():
        assert arm["accept_rate"] <= arm["verified_accept_rate"]
    head = evaluated.content["headline"]
    assert {k: head[k] for k in ("accept_rate", "verified_accept_rate")} == {
        k: evaluated.content["arms"]["draft"][k] for k in ("accept_rate", "verified_accept_rate")
    }
    assert "accepted / drafted" in evaluated.page and "verified_accept_rate: accepted / verified" in evaluated.page


def test_figures_of_another_definition_are_measured_anew(
    evaluated: Evaluated, places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    def seen(*_: Any) -> None:
        raise DraftlineError("far enough")

    monkeypatch.setattr(stages, "load_target", seen)
    monkeypatch.setitem(stages.CONVENTIONS, "tau", "something else")
    out = shutil.copytree(evaluated.report, tmp_path / "report")
    with pytest.raises(DraftlineError, match="far enough"):
        evaluate_draft(evaluated.calibrated, TARGET, places.corpus, ENGINE, BENCHMARK, out, places.cache)


def test_the_schedule_reckons_with_the_drafts_own_cost(evaluated: Evaluated) -> None:
    # Of all arms' rounds, n-gram's too, one running mean would be far below what the network costs.
    def spent(name: str) -> float:
        arm = evaluated.content["arms"][name]
        return arm["draft_share"] * arm["tau"] / arm["tokens_per_second"]

    learned = evaluated.content["step_cost"]["draft"]
    assert spent("draft fixed") / 3 < learned < spent("draft fixed") * 3
    assert learned > 3 * spent("ngram")


def test_two_answers_of_one_prompt_are_one_entry(places: Places) -> None:
    rows = read_rows(places.corpus, "heldout")
    twice = [*rows, *(dataclasses.replace(r, sample_id=f"{r.sample_id}-again") for r in rows)]
    calibration, evaluation = pick_prompts(twice, 8, 8, 0)
    prompts = [tuple(int(t) for t in r.input_ids[: r.prompt_length]) for r in [*calibration, *evaluation]]
    assert len(prompts) == len(set(prompts)) == min(16, len(rows))


def test_the_ratio_rule_is_calibrated_with_what_its_tokens_were_drawn_from(
    places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[bool] = []
    verify = verification.verify

    def spy(*args: Any, **settings: Any) -> Any:
        tokens, sampling = args[1], args[4]
        if settings["rule"] == "ratio" and tokens.shape[1] and not sampling.greedy and settings["d2t"] is not None:
            seen.append(settings["draft_logits"] is not None)
        return verify(*args, **settings)

    monkeypatch.setattr(verification, "verify", spy)
    ratio = dataclasses.replace(ENGINE, rule="ratio", scheduler="early_stop")
    calibrate_draft(places.draft, TARGET, places.corpus, ratio, BENCHMARK, tmp_path / "draft", places.cache)
    # One step may hold greedy blocks beside the first sampled prompt's last chunk: nothing was drawn there.
    assert len(seen) > 1
    assert sum(seen) >= len(seen) - 1
