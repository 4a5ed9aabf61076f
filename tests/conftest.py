"""For all tests: each is in a group of `make test`; a tiny target, made once, and a random draft for it; and an MLflow
store that was made once and is copied, for MLflow takes seconds to migrate an empty one.

What takes long to import is imported where it is needed: most tests need neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pipeline.drafts.dspark import DSparkDraft
    from pipeline.target import Target

# What the Makefile looks for; in one word it would take this file for one of those.
MARK = ".".join(("mark", "ray"))


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """A test with Ray's marker stands in a file that the Makefile finds: otherwise no group would run it."""
    marked = {item.path: item.nodeid for item in items if item.get_closest_marker("ray")}
    for path, test in marked.items():
        if MARK not in path.read_text():
            raise pytest.UsageError(
                f"{test} has the marker ray, and no group of `make test` would run it: the Makefile looks for the text "
                f"{MARK} in files of tests. Write it in {path.name}."
            )


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache_dir: Path) -> Target:
    """Of the test's own: engines take it over."""
    from pipeline.config import TargetConfig
    from pipeline.target import load_target

    return load_target(TargetConfig(path="tiny"), cache_dir)


@pytest.fixture
def draft(tiny: Target) -> DSparkDraft:
    import torch

    from pipeline.drafts.checkpoint import make_draft
    from pipeline.drafts.config import DraftConfig, resolve

    torch.manual_seed(0)
    config = resolve(DraftConfig(block_size=4, markov_rank=8, target_layer_ids=[0, 2]), tiny.config, tiny.unused_token)
    made = make_draft(config, tiny, torch.arange(0, tiny.vocab_size, 2))
    assert made.markov_head is not None
    torch.nn.init.normal_(made.markov_head.markov_w2.weight)
    return made


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
