"""An MLflow store that was made once and is copied: MLflow takes seconds to migrate an empty one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without runs."""
    from pipeline.registry.recorder import Recorder

    root = tmp_path_factory.mktemp("empty")
    Recorder(None, "unused", root)
    return root / "mlflow" / "mlflow.db"


@pytest.fixture
def migrated(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store that this test's process begins is a copy of that one."""
    from pipeline.registry import recorder

    begin = recorder.Recorder.__init__

    def begun(self: Any, uri: str | None, experiment: str, root: Path | str | None = None) -> None:
        if not uri and root is not None:
            store = Path(recorder.sqlite_uri(root).removeprefix("sqlite:///"))
            if not store.exists():
                store.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(empty_store, store)
        begin(self, uri, experiment, root)

    monkeypatch.setattr(recorder.Recorder, "__init__", begun)
