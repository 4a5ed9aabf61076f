"""A check: something measured against a bound. Gates are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Check:
    """One reason of a verdict: what was measured, the bound it had to meet, whether it did, and else what to do."""

    name: str
    value: float | bool | str
    bound: str
    passed: bool
    detail: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return dataclasses.asdict(self)


def table(checks: Sequence[Check]) -> str:
    """Checks as a text table, one line each."""
    rows = [("check", "value", "must be", "", "")]
    rows += [(c.name, _show(c.value), c.bound, "ok" if c.passed else "FAILED", c.detail) for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _show(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
