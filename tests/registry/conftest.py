from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from pipeline.registry.recorder import Recorder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A migrated database without runs: MLflow takes seconds to make one, so it is made once and copied."""
    root = tmp_path_factory.mktemp("empty")
    Recorder(None, "unused", root)
    return root / "mlflow" / "mlflow.db"


@pytest.fixture
def recorder(tmp_path, empty_store) -> Recorder:
    place = tmp_path / "mlflow"
    place.mkdir()
    shutil.copy(empty_store, place / "mlflow.db")
    return Recorder(None, "tests", tmp_path)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
