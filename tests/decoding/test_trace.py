"""The record of steps: what a trace viewer reads, and what it says of every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.trace import PHASES, StepRecord, StepTrace
from pipeline.errors import DraftlineError
from pipeline.target import Target
from tests.decoding.samples import prompt_ids, proposer_for


def spans(path: Path, name: str) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e["name"] == name and e["ph"] == "X"]


def test_an_engine_writes_what_its_steps_did(tiny: Target, tmp_path: Path) -> None:
    config = EngineConfig(max_requests=3, max_context=512, threads=1, scheduler="fixed", trace=str(tmp_path / "steps"))
    engine = Engine(tiny, config, proposer_for(tiny, "dspark"))
    done = engine.generate([Request(p, 20, id=f"r{i}") for i, p in enumerate(prompt_ids(tiny))])
    engine.trace.write()
    (file,) = (tmp_path / "steps").iterdir()
    steps = spans(file, "step")
    for completion in done:
        mine = [
            s["args"]["requests"][completion.request_id]
            for s in steps
            if completion.request_id in s["args"]["requests"]
        ]
        metrics = completion.metrics
        assert len(mine) == metrics.target_steps
        assert sum(m["emitted"] for m in mine) == metrics.decoded
        assert [m["verified"] for m in mine] == metrics.lengths
    assert sum(s["args"]["prefill"] for s in steps) == sum(map(len, prompt_ids(tiny)))
    for phase in PHASES:
        assert spans(file, phase), phase
    for before, after in zip(steps, steps[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2
    inside = [e for p in PHASES for e in spans(file, p)]
    assert sum(e["dur"] for e in inside) <= sum(s["dur"] for s in steps) + len(inside)


def record(i: int) -> StepRecord:
    return StepRecord((i, i + 0.1, i + 0.2, i + 0.3, i + 0.4), 2, 0, [("a", 1, 1, 2)])


def test_a_trace_keeps_the_latest_steps_and_is_written_as_it_goes(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, most=3, every=5)
    assert spans(trace.path, "step") == [], "a folder that can't be written is known before anything is decoded"
    for i in range(9):
        trace.add(record(i))
    assert [s["ts"] for s in spans(trace.path, "step")] == [2e6, 3e6, 4e6]
    trace.write()
    assert [s["ts"] for s in spans(trace.path, "step")] == [6e6, 7e6, 8e6]
    assert [f.name for f in tmp_path.iterdir()] == [trace.path.name], "nothing is left beside it"


def test_few_steps_are_written_too_once_some_time_has_passed(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, seconds=0.0)
    for i in range(3):
        trace.add(record(i))
        assert len(spans(trace.path, "step")) == i + 1


def test_a_place_that_cannot_be_written_is_refused_with_its_name(tiny: Target, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = EngineConfig(max_requests=1, max_context=64, threads=1, trace=str(tmp_path / "file" / "steps"))
    with pytest.raises(DraftlineError, match=r"engine.trace='.*file/steps' can't be written"):
        Engine(tiny, config)


def test_a_disk_that_fills_ends_the_trace_and_no_request(
    tiny: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = EngineConfig(max_requests=3, max_context=512, threads=1, trace=str(tmp_path))
    engine = Engine(tiny, config)
    engine.trace = StepTrace(tmp_path, every=3)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.decoding.trace.write_text", full)
    done = engine.generate([Request(p, 20) for p in prompt_ids(tiny)])
    assert {d.finish_reason for d in done} <= {"stop", "length"}
    told = [r.message for r in caplog.records if "The trace of steps ends" in r.message]
    assert len(told) == 1 and "No space left" in told[0]
    assert spans(engine.trace.path, "step") == [], "what was there stays whole"
