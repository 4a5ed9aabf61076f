"""A record of the engine's steps that chrome://tracing and Perfetto open (`engine.trace`)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from pipeline.artifact import write_text
from pipeline.errors import DraftlineError

log = logging.getLogger(__name__)
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

    A step becomes text when it is added, so that writing, which happens between two steps, is one join and one write.
    What fails in it (a full disk) is told once and ends the trace, never the engine.

    Args:
        folder: gets `steps-<process>-<engine>.json`, at once, without steps.
        most: how many steps are kept, the latest ones.
        every, seconds: steps and time after which, when a step comes, the file is written anew (whole, aside, and
            renamed), so that what a killed process leaves is hardly older.
    Raises:
        DraftlineError: nothing can be written there.
    """

    def __init__(self, folder: Path | str, *, most: int = 20_000, every: int = 2_000, seconds: float = 10.0) -> None:
        self.path = Path(folder) / f"steps-{os.getpid()}-{next(_count)}.json"
        self._steps: collections.deque[str] = collections.deque(maxlen=most)
        self._every, self._seconds = every, seconds
        self._unwritten = 0
        self._ended = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._replace()
        except OSError as e:
            raise DraftlineError(
                f"engine.trace={str(folder)!r} can't be written ({e.strerror or e}). Name a folder that can, or '' for "
                "no trace."
            ) from None

    def add(self, step: StepRecord) -> None:
        """Adds a step."""
        if self._ended:
            return
        self._steps.append(",\n".join(json.dumps(e) for e in _events(step)))
        self._unwritten += 1
        if self._unwritten >= self._every or time.monotonic() - self._written >= self._seconds:
            self.write()

    def write(self) -> None:
        """Writes what was collected since the file was written last."""
        if self._ended or not self._unwritten:
            return
        try:
            self._replace()
        except OSError as e:
            self._ended = True
            self._steps.clear()
            log.warning("The trace of steps ends: %s can't be written (%s).", self.path, e.strerror or e)

    def _replace(self) -> None:
        write_text(self.path, '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(self._steps) + "\n]}\n")
        self._unwritten, self._written = 0, time.monotonic()


def _events(step: StepRecord) -> list[dict[str, Any]]:
    micros = [round(t * 1e6, 1) for t in step.times]
    requests = {i: {"verified": n, "accepted": a, "emitted": e} for i, n, a, e in step.requests}
    out = [_span("step", micros[0], micros[-1], {"tokens": step.tokens, "prefill": step.prefill, "requests": requests})]
    out += [_span(name, a, b, {}) for name, a, b in zip(PHASES, micros, micros[1:], strict=False) if b > a]
    counters = {"tokens": step.tokens, "requests": len(requests)}
    return [*out, {"name": "batch", "ph": "C", "ts": micros[0], "pid": 0, "args": counters}]


def _span(name: str, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": begin, "dur": round(end - begin, 1), "pid": 0, "tid": 0, "args": args}
