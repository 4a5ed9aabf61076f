"""What a target step costs: seconds by (tokens in the step, context length), measured on this machine and kept true.

A table belongs to a machine and its load, not to a draft: every engine measures its own when it starts and refines it
from the steps that it takes; reports keep the table that they were decided with.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import platform
from collections.abc import Callable, Sequence


@dataclasses.dataclass
class StepCost:
    """A measured table with bilinear interpolation between its points.

    Attributes:
        tokens: rising token counts. contexts: rising context lengths.
        table: seconds[i][j] for tokens[i] at contexts[j]. It may fall in i: matrix products have sizes that they like.
        draft: seconds that drafting adds to a round (0: not measured), the same for every length.
        hardware: where it was measured.
    """

    tokens: list[int]
    contexts: list[int]
    table: list[list[float]]
    draft: float = 0.0
    hardware: str = dataclasses.field(default_factory=lambda: platform.processor() or platform.machine())

    def seconds(self, tokens: int, context: int) -> float:
        """Seconds of a round that verifies `tokens` tokens in all: the target step, plus drafting."""
        return self._step(tokens, context) + self.draft

    def observe(self, tokens: int, context: int, seconds: float, rate: float = 0.05) -> None:
        """Moves the table towards a step that took `seconds` (drafting apart).

        A step says most about its own count of tokens and less about others, by half per doubling: a count that the
        scheduler never picks would else keep its first measurement for ever, however the machine has changed since. A
        single step moves nothing by more than `rate`, so that a hiccup of the machine passes without a trace.
        """
        error = min(max(seconds / self._step(tokens, context) - 1, -1.0), 1.0)
        j, wj = _place(self.contexts, context, extrapolate=False)
        columns = {j: 1 - wj, min(j + 1, len(self.contexts) - 1): wj} if len(self.contexts) > 1 else {0: 1.0}
        for column, share in columns.items():
            for t, row in zip(self.tokens, self.table, strict=True):
                row[column] *= 1 + rate * share * error * 2.0 ** -abs(math.log2(tokens / t))

    def copy(self, draft: float | None = None) -> StepCost:
        """A table that learns apart from this one."""
        return dataclasses.replace(
            self, table=[list(row) for row in self.table], draft=self.draft if draft is None else draft
        )

    def _step(self, tokens: int, context: int) -> float:
        i, wi = _place(self.tokens, tokens)
        j, wj = _place(self.contexts, context, extrapolate=False)
        low = self.table[i][j] * (1 - wj) + self.table[i][min(j + 1, len(self.contexts) - 1)] * wj
        if len(self.tokens) == 1:
            return low
        high = self.table[i + 1][j] * (1 - wj) + self.table[i + 1][min(j + 1, len(self.contexts) - 1)] * wj
        return max(low * (1 - wi) + high * wi, 1e-9)


def measure(
    run: Callable[[int, int], float], tokens: Sequence[int], contexts: Sequence[int], repeats: int = 8
) -> StepCost:
    """Profiles `run(tokens, context) -> seconds`: repeats interleaved, lower quartiles.

    Whatever disturbs a measurement makes it longer, so the lower quartile is nearer to the truth than the mean or the
    median. Nothing is smoothed: on two AVX-512 cores a step over two tokens took 43 ms where one took 38 and three to
    six 37, and a table that rises by force would have the scheduler choose the dear ones.
    """
    samples: dict[tuple[int, int], list[float]] = {}
    for c in contexts:
        for t in tokens:
            run(t, c)
    for _ in range(repeats):
        for c in contexts:
            for t in tokens:
                samples.setdefault((t, c), []).append(run(t, c))
    table = [[sorted(samples[t, c])[repeats // 4] for c in contexts] for t in tokens]
    return StepCost(list(tokens), list(contexts), table)


def _place(grid: list[int], x: int, *, extrapolate: bool = True) -> tuple[int, float]:
    """Index of the cell of `x` in a rising grid, and its fraction inside (beyond 1 past the last point)."""
    if len(grid) == 1:
        return 0, 0.0
    i = min(max(bisect.bisect_right(grid, x) - 1, 0), len(grid) - 2)
    w = (x - grid[i]) / (grid[i + 1] - grid[i])
    w = max(w, 0.0)
    return i, w if extrapolate else min(w, 1.0)
