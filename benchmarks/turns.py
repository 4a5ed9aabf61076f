"""Two sides measured by turns: how one stands to the other. Imported by the benchmarks; it loads no model."""

from __future__ import annotations

import math
import random
import statistics


def ratio(pairs: list[tuple[float, float]], draws: int = 2000) -> tuple[float, float, float]:
    """Geometric mean of first / second over the turns, and its bootstrap interval of 95 %."""
    logs = [math.log(a / b) for a, b in pairs]
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(logs, k=len(logs))) for _ in range(draws))
    return math.exp(statistics.fmean(logs)), math.exp(means[int(0.025 * draws)]), math.exp(means[int(0.975 * draws)])
