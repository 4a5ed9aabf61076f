from __future__ import annotations

import socket

import pytest

from pipeline.registry.recorder import Recorder


@pytest.fixture
def recorder(tmp_path, migrated) -> Recorder:
    return Recorder(None, "tests", tmp_path)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
