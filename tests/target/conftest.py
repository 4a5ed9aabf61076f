"""The tiny target, made once per session in a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import TargetConfig
from pipeline.target import Target, load_target


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(cache_dir: Path) -> Target:
    torch.set_num_threads(1)
    return load_target(TargetConfig(path="tiny"), cache_dir)
