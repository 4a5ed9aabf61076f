"""Sequential temperature scaling of a draft's confidences (DSpark section 3.3; algorithms.md 5).

Left to right, the temperature of position k is the grid value that minimises the calibration error of the cumulative
product of calibrated confidences against the observed survival of the prefix; earlier temperatures stay fixed. One
temperature per position keeps the order of confidences within it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import auc, ece, reliability

GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 65))
FEWEST = 30


@dataclasses.dataclass(frozen=True)
class Calibration:
    """temperatures: K floats. positions: per position ECE and AUC before and after, reliability bins, rounds that
    reached it, and whether it had too few of them to fit (then it keeps the temperature before it)."""

    temperatures: list[float]
    positions: list[dict[str, Any]]
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fit(raw: np.ndarray, accepted: np.ndarray, temperatures: np.ndarray | None = None) -> Calibration:
    """Fits temperatures, or, given some, only measures them.

    Args:
        raw: float[N, K], confidence logits of N rounds whose whole block was verified.
        accepted: int[N], accepted tokens of each round.
        temperatures: float[K] to measure instead of fitting.
    """
    rounds, block = raw.shape
    survived = accepted[:, None] > np.arange(block)
    before = _sigmoid(raw).cumprod(1)
    product = np.ones(rounds)
    chosen: list[float] = []
    notes: list[dict[str, Any]] = []
    for k in range(block):
        reached = int((accepted >= k).sum())
        few = reached < FEWEST
        if temperatures is not None:
            t = float(temperatures[k])
        elif few:
            t = chosen[-1] if chosen else 1.0
        else:
            errors = [ece(product * _sigmoid(raw[:, k] / g), survived[:, k]) for g in GRID]
            t = float(GRID[int(np.argmin(errors))])
        chosen.append(t)
        product = product * _sigmoid(raw[:, k] / t)
        outcome = survived[:, k].astype(float)
        here = accepted >= k
        notes.append(
            {
                "position": k + 1,
                "rounds": reached,
                "too_few": few,
                "temperature": t,
                "ece_before": ece(before[:, k], outcome),
                "ece_after": ece(product, outcome),
                "auc": auc(raw[here, k], outcome[here]),
                "reliability_before": reliability(before[:, k], outcome),
                "reliability_after": reliability(product, outcome),
            }
        )
    return Calibration(chosen, notes, rounds)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
