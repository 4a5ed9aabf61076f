"""For all tests: each is in a group of `make test`; and an MLflow store that was made once and is copied, for MLflow
takes seconds to migrate an empty one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

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
