"""The whole pipeline on a tiny target, through a real `ray job submit` to a cluster of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import artifact

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = {
    "target", "draft", "tau", "accept_rate", "speedup", "speedup_low", "speedup_t1", "ngram_speedup", "exact_greedy",
    "champion_version", "mlflow_uri", "report", "seconds",
}  # fmt: skip


def demo(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "infra/local/demo.py", "--experiment", "smoke", "--output-root", str(output)]
    return subprocess.run([*command, "--", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_corpus_to_served_champion_and_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert set(summary) == KEYS
    assert summary["exact_greedy"] is True
    assert summary["tau"] >= 1.0
    assert Path(summary["report"]).is_file()
    assert json.loads((tmp_path / "smoke" / "served.json").read_text())["version"] == summary["champion_version"]

    drafted = (tmp_path / "smoke" / "draft" / "manifest.json").read_bytes()
    second = demo(tmp_path)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    for stage in ("corpus", "extract", "train", "calibrate", "parity", "evaluate", "register", "promote"):
        assert f"== {stage}: skipped" in second.stdout, stage
    assert (tmp_path / "smoke" / "draft" / "manifest.json").read_bytes() == drafted
    assert json.loads((tmp_path / "smoke" / "summary.json").read_text()) == summary, "its seconds too"

    # A stage that was skipped left no run.
    once = [
        "calibrate",
        "corpus",
        "evaluate",
        "extract",
        "parity",
        "promote",
        "regenerate",
        "register",
        "serve",
        "train",
    ]
    assert stages_of(summary["mlflow_uri"]) == once


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_draft_must_hold_its_own_beside_the_champion(tmp_path: Path) -> None:
    """A floor that it can't reach refuses it."""
    first = demo(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    champion = artifact.load(tmp_path / "smoke" / "calibrated", "draft").digest
    second = demo(tmp_path, "trainer.seed=1", "trainer.warm_start.draft=champion", "gate.min_tau=1000")
    assert second.returncode == 3, second.stdout[-3000:] + second.stderr[-3000:]
    for part in ("verdict: refuse", "FAILED", "over_champion_low", "side by side on 3 prompts", "Train a better draft"):
        assert part in second.stdout, part
    assert not (tmp_path / "smoke" / "summary.json").exists()
    trained = json.loads((tmp_path / "smoke" / "draft" / "manifest.json").read_text())
    assert trained["inputs"]["former"] == champion, "the champion, from the registry"


def stages_of(uri: str) -> list[str]:
    """The stages of the finished child runs, sorted."""
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("draftline").experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    train = next(r for r in runs if r.data.tags.get("draftline.stage") == "train")
    assert [m.step for m in client.get_metric_history(train.info.run_id, "loss")] == [3, 6, 9, 12]
    return sorted(r.data.tags["draftline.stage"] for r in runs if "draftline.stage" in r.data.tags)
