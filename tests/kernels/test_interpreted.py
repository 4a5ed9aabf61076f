"""Runs the kernels' tests (`device/`) in Triton's interpreter, where no GPU runs them directly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "device"


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' tests run on the GPU here")
def test_interpreted() -> None:
    """Every test passes, and every file has one that runs here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "-rp", str(FOLDER)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    for file in FOLDER.glob("test_*.py"):
        assert f"PASSED tests/kernels/device/{file.name}::" in done.stdout, file.name
