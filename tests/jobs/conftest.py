from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _stores_are_copied(migrated: None) -> None: ...
