"""A tiny target and a random draft for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import TargetConfig
from pipeline.drafts.checkpoint import make_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target, load_target


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache_dir: Path) -> Target:
    return load_target(TargetConfig(path="tiny"), cache_dir)


@pytest.fixture
def draft(tiny: Target) -> DSparkDraft:
    torch.manual_seed(0)
    config = resolve(DraftConfig(block_size=4, markov_rank=8, target_layer_ids=[0, 2]), tiny.config, tiny.unused_token)
    made = make_draft(config, tiny, torch.arange(0, tiny.vocab_size, 2))
    assert made.markov_head is not None
    torch.nn.init.normal_(made.markov_head.markov_w2.weight)
    return made
