"""What transformers' own generate says greedily to the prompts: made once for all files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import TargetConfig
from pipeline.target import load_target
from tests.decoding.samples import LONG, NEW, greedy_texts, prompt_ids
from tests.decoding.tape import Tapes, record_on_tapes


@pytest.fixture(scope="session")
def expected(cache_dir: Path) -> list[list[int]]:
    """Texts of PROMPTS."""
    texts = greedy_texts(cache_dir, prompt_ids(load_target(TargetConfig(path="tiny"), cache_dir)), LONG)
    assert len(set(map(tuple, texts))) == len(texts)
    return texts


@pytest.fixture(scope="session")
def alike(cache_dir: Path) -> list[list[int]]:
    """Some that begin alike for several pages, in the middle of one too, and one that is another's beginning."""
    ids = prompt_ids(load_target(TargetConfig(path="tiny"), cache_dir))
    common = (ids[2] * 3)[:50]
    return [common + ids[0], common + ids[1], common[:40] + ids[3], common, common + ids[0] + ids[4], ids[4]]


@pytest.fixture(scope="session")
def alike_expected(cache_dir: Path, alike: list[list[int]]) -> list[list[int]]:
    """Texts of `alike`."""
    return greedy_texts(cache_dir, alike, NEW)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Engines made meanwhile record their steps on these."""
    return record_on_tapes(monkeypatch)
