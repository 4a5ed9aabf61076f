"""benchmarks/load.py and benchmarks/engine.py run to their end and write what they print."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TargetConfig
from pipeline.drafts.checkpoint import save_draft
from pipeline.target import load_target
from tests.drafts.samples import small_draft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("benchmarks")
    target = load_target(TargetConfig(path="tiny"), root / "cache")
    save_draft(root / "draft", small_draft(target), target=target.identity.as_dict(), config={}, inputs={})
    return ["--draft", str(root / "draft"), "--cache", str(root / "cache"), "--target", "tiny", "--threads", "1"]


def results(script: str, *options: str) -> dict[str, Any]:
    out = Path(options[options.index("--json") + 1])
    ran = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())["results"]
    return found


def test_load(places: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "load.svg"
    options = ["--levels", "1,3", "--passes", "2", "--max-new-tokens", "8", "--bootstrap", "50"]
    if drawn := importlib.util.find_spec("matplotlib") is not None:
        options += ["--plot", str(plot)]
    found = results("load.py", *places, *options, "--json", str(tmp_path / "load.json"))
    assert [set(found[n]) for n in ("1", "3")] == [{"none", "ngram", "draft fixed", "draft"}] * 2
    for arms in found.values():
        assert arms["none"]["totals"] == 1.0 and arms["none"]["mean_length"] == 0.0
        assert arms["draft fixed"]["skipped"] == 0.0 < arms["draft fixed"]["mean_length"]
        assert all(r["totals_low"] <= r["totals"] <= r["totals_high"] for r in arms.values())
    assert not drawn or plot.stat().st_size > 1000


def test_engine(places: list[str], tmp_path: Path) -> None:
    sizes = ["--prompts", "2", "--max-new-tokens", "8", "--repeats", "2", "--context", "512", "--output", "24"]
    found = results("engine.py", *places, *sizes, "--bootstrap", "50", "--json", str(tmp_path / "engine.json"))
    assert set(found["generate"]) == {"transformers generate", "engine, plain"}
    assert set(found["steps"]) == {"1 tokens", "2 tokens", "4 tokens", "8 tokens"}
    assert "draft, temperature 1, ratio" in found["draft"]
    assert found["context"]["output of 24, quarter 4"]["milliseconds"] > 0
    shares = found["overhead"]["draft"]
    assert sum(shares[k] for k in ("target", "draft", "verify", "outside")) == pytest.approx(1, abs=1e-3)
