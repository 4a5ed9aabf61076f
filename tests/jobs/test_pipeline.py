"""The main job's own part: what it hands from stage to stage, and what it says of it at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import pipeline as job
from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.entry import compose, recorder
from pipeline.registry import registration
from tests.jobs.test_export import prepare
from tests.registry.reports import report

NAME = "draftline-tiny-dspark"


def register(config: PipelineConfig, speedup: float) -> str:
    """The run's draft with another report: a version of its own."""
    draft, out = artifact.load(config.run_dir / "calibrated", "draft"), config.run_dir / "report"
    with artifact.create(out, "report", config={}, inputs={}, target=draft.target) as staging:
        content = report(speedup, draft_digest=draft.digest, target=draft.target)
        (staging.path / "report.json").write_text(json.dumps(content))
    kept = recorder(config)
    with kept.stage(kept.parent("smoke"), "register") as run:
        return registration.register(kept, lambda: run, NAME, config.run_dir / "calibrated", out)


def test_what_it_registered_is_promoted_though_another_is_challenger_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(prepare(tmp_path, registered=True))
    ours, others = register(config, 1.51), register(config, 1.52)
    for stage in ("regenerate", "corpus", "extract", "train", "calibrate", "parity", "evaluate", "serve"):
        monkeypatch.setattr(getattr(job, stage), "stage", lambda *_: None)
    monkeypatch.setattr(job.parity, "require", lambda *_: None)
    monkeypatch.setattr(job.register, "stage", lambda *_: ours)
    monkeypatch.setattr(job, "summarise", lambda *figures: {"champion_version": figures[2]})
    job.main(config)
    aliases = {alias: str(v) for alias, v in recorder(config).client.get_registered_model(NAME).aliases.items()}
    assert aliases == {"champion": ours, "previous": "1", "challenger": others}
    assert json.loads((config.run_dir / "summary.json").read_text())["champion_version"] == ours
