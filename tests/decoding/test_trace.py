"""The record of steps: what a trace viewer reads, and what it says of every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.trace import PHASES, StepRecord, StepTrace
from pipeline.target import Target
from tests.decoding.test_engine import prompt_ids, proposer_for
from tests.drafts.conftest import cache_dir, tiny  # noqa: F401


def spans(path: Path, name: str) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e["name"] == name and e["ph"] == "X"]


def test_an_engine_writes_what_its_steps_did(tiny: Target, tmp_path: Path) -> None:  # noqa: F811
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


def test_a_trace_keeps_the_latest_steps_and_is_written_as_it_goes(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, most=3, every=5)
    for i in range(9):
        trace.add(StepRecord((i, i + 0.1, i + 0.2, i + 0.3, i + 0.4), 2, 0, [("a", 1, 1, 2)]))
    assert [s["ts"] for s in spans(trace.path, "step")] == [2e6, 3e6, 4e6]
    trace.write()
    assert [s["ts"] for s in spans(trace.path, "step")] == [6e6, 7e6, 8e6]
    assert [f.name for f in tmp_path.iterdir()] == [trace.path.name], "nothing is left beside it"
