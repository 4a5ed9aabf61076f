"""The whole pipeline on a tiny target, through a real `ray job submit` to a cluster of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    for stage in ("corpus", "extract", "train", "calibrate", "evaluate"):
        assert f"== {stage}: skipped" in second.stdout, stage
    assert (tmp_path / "smoke" / "draft" / "manifest.json").read_bytes() == drafted


@pytest.mark.ray
def test_a_refused_promotion_ends_the_job_with_3_and_its_numbers(tmp_path: Path) -> None:
    refused = demo(tmp_path, "gate.min_tau=1000")
    assert refused.returncode == 3, refused.stdout[-3000:] + refused.stderr[-3000:]
    assert "verdict: refuse" in refused.stdout
    assert "FAILED" in refused.stdout
