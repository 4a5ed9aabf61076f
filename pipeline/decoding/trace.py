"""A record of the engine's steps that chrome://tracing and Perfetto open (`engine.trace`)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

from pipeline.artifact import write_json

_count = itertools.count()
PHASES = ("propose", "schedule", "target", "verify")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        times: five moments, seconds by `time.perf_counter`: when the step began, then when each of `PHASES` ended.
        tokens: of the step, all requests together. prefill: of them, tokens of prompts.
        requests: per decoding request id, verified length, accepted and emitted tokens.
    """

    times: tuple[float, float, float, float, float]
    tokens: int
    prefill: int
    requests: list[tuple[str, int, int, int]]


class StepTrace:
    """Collects steps and writes them as Chrome trace JSON, one file per engine.

    Args:
        folder: gets `steps-<process>-<engine>.json`.
        most: how many steps are kept, the latest ones. every: steps after which the file is written anew (whole, aside,
            and renamed), so that what a killed process leaves is at most so much older.
    """

    def __init__(self, folder: Path | str, *, most: int = 20_000, every: int = 2_000) -> None:
        self.path = Path(folder) / f"steps-{os.getpid()}-{next(_count)}.json"
        self._steps: collections.deque[StepRecord] = collections.deque(maxlen=most)
        self._every = every
        self._seen = 0

    def add(self, step: StepRecord) -> None:
        """Adds a step."""
        self._steps.append(step)
        self._seen += 1
        if self._seen % self._every == 0:
            self.write()

    def write(self) -> None:
        """Writes what was collected."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        events = [e for s in self._steps for e in _events(s)]
        write_json(self.path, {"displayTimeUnit": "ms", "traceEvents": events}, indent=None)


def _events(step: StepRecord) -> list[dict[str, Any]]:
    micros = [round(t * 1e6, 1) for t in step.times]
    requests = {i: {"verified": n, "accepted": a, "emitted": e} for i, n, a, e in step.requests}
    out = [_span("step", micros[0], micros[-1], {"tokens": step.tokens, "prefill": step.prefill, "requests": requests})]
    out += [_span(name, a, b, {}) for name, a, b in zip(PHASES, micros, micros[1:], strict=False) if b > a]
    counters = {"tokens": step.tokens, "requests": len(requests)}
    return [*out, {"name": "batch", "ph": "C", "ts": micros[0], "pid": 0, "args": counters}]


def _span(name: str, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": begin, "dur": round(end - begin, 1), "pid": 0, "tid": 0, "args": args}
