"""What a target step costs: seconds by (tokens in the step, context length), measured on this machine."""

from __future__ import annotations

import bisect
import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.artifact import write_json
from pipeline.errors import ArtifactError

SCHEMA = 1


@dataclasses.dataclass
class StepCost:
    """A measured table with bilinear interpolation between its points.

    Attributes:
        tokens: rising token counts. contexts: rising context lengths.
        table: seconds[i][j] for tokens[i] at contexts[j].
        draft: seconds that drafting adds to a round (0: not measured), the same for every length.
        hardware: where it was measured.
    """

    tokens: list[int]
    contexts: list[int]
    table: list[list[float]]
    draft: float = 0.0
    hardware: str = dataclasses.field(default_factory=lambda: platform.processor() or platform.machine())

    def __post_init__(self) -> None:
        self._memo: dict[tuple[int, int], float] = {}

    def seconds(self, tokens: int, context: int) -> float:
        """Seconds of a round that verifies `tokens` tokens in all: the target step, plus drafting."""
        key = (tokens, context // 64)
        if key not in self._memo:
            self._memo[key] = self._step(tokens, (context // 64) * 64)
        return self._memo[key] + self.draft

    def _step(self, tokens: int, context: int) -> float:
        i, wi = _place(self.tokens, tokens)
        j, wj = _place(self.contexts, context, extrapolate=False)
        low = self.table[i][j] * (1 - wj) + self.table[i][min(j + 1, len(self.contexts) - 1)] * wj
        if len(self.tokens) == 1:
            return low
        high = self.table[i + 1][j] * (1 - wj) + self.table[i + 1][min(j + 1, len(self.contexts) - 1)] * wj
        return max(low * (1 - wi) + high * wi, 1e-9)

    def save(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> StepCost:
        """Raises ArtifactError when the file isn't a step cost table."""
        try:
            raw = json.loads(path.read_text())
            if raw.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            return cls(**raw)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ArtifactError(f"{path} is not a step cost table ({e}). Delete it; it is measured anew.") from None


def measure(
    run: Callable[[int, int], float], tokens: Sequence[int], contexts: Sequence[int], repeats: int = 5
) -> StepCost:
    """Profiles `run(tokens, context) -> seconds`: repeats interleaved, medians, made non-falling in tokens.

    A larger step measured as cheaper than a smaller one is noise that would lead the scheduler astray; each point is
    therefore at least the point before it.
    """
    samples: dict[tuple[int, int], list[float]] = {}
    for c in contexts:
        for t in tokens:
            run(t, c)
    for _ in range(repeats):
        for c in contexts:
            for t in tokens:
                samples.setdefault((t, c), []).append(run(t, c))
    table: list[list[float]] = []
    for t in tokens:
        row = [sorted(samples[t, c])[repeats // 2] for c in contexts]
        if table:
            row = [max(new, old) for new, old in zip(row, table[-1], strict=True)]
        table.append(row)
    return StepCost(list(tokens), list(contexts), table)


def _place(grid: list[int], x: int, *, extrapolate: bool = True) -> tuple[int, float]:
    """Index of the cell of `x` in a rising grid, and its fraction inside (beyond 1 past the last point)."""
    if len(grid) == 1:
        return 0, 0.0
    i = min(max(bisect.bisect_right(grid, x) - 1, 0), len(grid) - 2)
    w = (x - grid[i]) / (grid[i + 1] - grid[i])
    w = max(w, 0.0)
    return i, w if extrapolate else min(w, 1.0)
