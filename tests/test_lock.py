"""Locks keep others out, and where a file system knows none the work goes on and says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifact
from pipeline.config import TargetConfig
from pipeline.lock import lock, locked
from pipeline.registry.recorder import Recorder
from pipeline.target import obtain


def test_who_does_not_wait_is_refused_while_another_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / ".lock"
    with locked(file), file.open("w") as other, pytest.raises(BlockingIOError):
        lock(other, wait=False)
    with file.open("w") as other:
        lock(other, wait=False)


def fail(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pipeline.lock.fcntl.flock", flock)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_artifacts_targets_and_stores_are_made_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    fail(monkeypatch, code)
    with artifact.create(tmp_path / "thing", "thing", config={}):
        pass
    artifact.load(tmp_path / "thing", "thing")
    assert f"{tmp_path} knows no locks ({os.strerror(code)})" in capsys.readouterr().out
    artifact.load(obtain(TargetConfig(path="tiny"), tmp_path / "cache"), "target")
    assert f"{tmp_path / 'cache'} knows no locks" in capsys.readouterr().out
    monkeypatch.setattr(Recorder, "_experiment", lambda *_: "0")
    Recorder(None, "tests", tmp_path)
    assert f"{tmp_path / 'mlflow'} knows no locks" in capsys.readouterr().out


def test_another_fault_of_the_file_system_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / ".lock"):
        pytest.fail("not locked")
