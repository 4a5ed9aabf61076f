"""No test falls out of the groups of `make test`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import MARK, pytest_collection_modifyitems


def collected(place: Path, name: str, text: str, *marks: str) -> Any:
    """A test of a file with this text and these markers, as pytest collects it."""
    file = place / name
    file.write_text(text)
    return SimpleNamespace(path=file, nodeid=f"{name}::test_it", get_closest_marker=lambda m: m in marks)


def test_a_ray_test_that_the_makefile_would_not_find_is_an_error(tmp_path: Path) -> None:
    plain = collected(tmp_path, "test_plain.py", "")
    found = collected(tmp_path, "test_found.py", f"@pytest.{MARK}\n", "ray")
    pytest_collection_modifyitems([plain, found])
    hidden = collected(tmp_path, "test_hidden.py", "from tests.elsewhere import marked\n", "ray")
    with pytest.raises(pytest.UsageError, match="test_hidden.py::test_it has the marker ray, and no group"):
        pytest_collection_modifyitems([plain, found, hidden])


def test_the_makefile_looks_for_the_same_text() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "WITH_RAY = $(sort $(shell grep -rl --include '*.py' 'mark[.]ray' tests))" in makefile
