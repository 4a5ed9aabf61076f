"""A stage's run is there while it works, ends as it did, and is told of once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import artifact, entry
from pipeline.config import PipelineConfig
from pipeline.errors import DraftlineError
from pipeline.registry.recorder import ARTIFACT, Recorder


@pytest.fixture
def config(tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    monkeypatch.setattr(entry, "recorder", lambda _: recorder)
    return PipelineConfig(name="mine", output_root=str(tmp_path / "outputs"))


def stage(config: PipelineConfig, watch=lambda: None) -> artifact.Manifest:
    """A stage as the rooms write them: current, or begun and made."""
    out = config.run_dir / "report"
    plain = {"config": {"prompts": 2}, "inputs": {"draft": "d" * 64}}

    def make(begin) -> artifact.Manifest:
        if (done := artifact.current(out, "report", **plain)) is not None:
            return done
        begin()
        watch()
        with artifact.create(out, "report", **plain) as staging:
            (staging.path / "report.json").write_text("{}")
            staging.counts["prompts"] = 2
        return artifact.load(out, "report")

    return entry.record(
        "evaluate", config, make, out, sources={"draft": config.run_dir / "draft"}, files=["report.json"]
    )


def runs(recorder: Recorder) -> list:
    found = recorder.client.search_runs([recorder.experiment_id], "tags.`draftline.stage` = 'evaluate'")
    return sorted(found, key=lambda r: r.info.start_time)


def test_the_run_is_open_while_the_stage_works_and_holds_what_it_made(config, recorder) -> None:
    during: list[str] = []
    manifest = stage(config, lambda: during.extend(r.info.status for r in runs(recorder)))
    assert during == ["RUNNING"]
    (run,) = runs(recorder)
    assert run.info.status == "FINISHED"
    assert run.data.tags[ARTIFACT] == manifest.digest
    assert run.data.metrics["prompts"] == 2
    assert "seconds" in run.data.metrics
    (dataset,) = run.inputs.dataset_inputs
    assert str(config.run_dir / "draft") in dataset.dataset.source
    assert {a.path for a in recorder.client.list_artifacts(run.info.run_id)} == {
        "config.json",
        "manifest.json",
        "report.json",
    }


def test_a_stage_that_fails_leaves_its_run_and_the_next_has_one_of_its_own(config, recorder) -> None:
    def broken() -> None:
        raise DraftlineError("the target is gone")

    with pytest.raises(DraftlineError, match="gone"):
        stage(config, broken)
    (run,) = runs(recorder)
    assert run.info.status == "FAILED"
    assert "the target is gone" in run.data.tags["draftline.error"]
    stage(config)
    assert [r.info.status for r in runs(recorder)] == ["FAILED", "FINISHED"]


def test_a_skipped_stage_leaves_no_run_unless_none_tells_of_its_artifact(config, recorder, capsys) -> None:
    stage(config)
    stage(config)
    assert len(runs(recorder)) == 1
    assert "== evaluate: skipped" in capsys.readouterr().out
    recorder.client.delete_run(runs(recorder)[0].info.run_id)
    manifest = stage(config)
    (run,) = runs(recorder)
    assert run.data.tags[ARTIFACT] == manifest.digest
    assert "seconds" not in run.data.metrics


def test_a_submitted_job_refuses_places_that_ray_deletes(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    ran: list[PipelineConfig] = []
    assert entry.run(ran.append, "corpus", ["experiment=smoke"], ray=False) == 2
    assert "output_root='outputs' is relative" in capsys.readouterr().err
    assert entry.run(ran.append, "corpus", ["experiment=smoke", "output_root=/o", "cache_dir=/c"], ray=False) == 0
    assert [c.output_root for c in ran] == ["/o"]
