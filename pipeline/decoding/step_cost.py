"""What a target step costs: seconds by (tokens in the step, context length), measured on this machine and kept true.

A table belongs to a machine and its load, not to a draft: every engine measures its own when it starts and refines it
from the steps that it takes; reports keep the table that they were decided with. A table can be kept in a file with
what it was measured on (`kept`), and then the next engine there starts at once.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifact import SCHEMA_VERSION, digest_json, write_json

log = logging.getLogger(__name__)

READ_AS = 64
"""Rows that cost a draft as much as reading its weights does, about, where nothing better is known."""
Learned = dict[int, tuple[float, int]]
"""Mean seconds by a number of requests or rows, and how often each was observed."""


def device_name(device: torch.device | str = "cpu") -> str:
    """The model of a GPU, or of this machine's CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown CPU"


class StepTimer:
    """Times one step after the other; on CUDA by events on the stream, so that nobody waits before `seconds`. Where a
    step runs on several devices, `stop` waits for them all: events of one would tell nothing of the others.

    Args:
        devices: that steps run on.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._several = [d for d in devices if d.type == "cuda"] if len(devices) > 1 else []
        self._device = next(iter(devices))
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._times = (0.0, 0.0)
        if self._device.type == "cuda" and not self._several:
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def start(self) -> None:
        """A step begins."""
        if self._events is not None:
            self._events[0].record(torch.cuda.current_stream(self._device))
        else:
            self._times = (time.perf_counter(), 0.0)

    def stop(self) -> None:
        """All of it was asked of the device."""
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
            return
        for device in self._several:
            torch.cuda.synchronize(device)
        self._times = (self._times[0], time.perf_counter())

    def seconds(self) -> float:
        """Of the last step, when the device is done with it."""
        if self._events is None:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class _Padded:
    """A step cost where steps are padded: each size costs what it is run as.

    Args:
        buckets: sizes in tokens that steps are padded to, rising; larger steps are run as they are.
    """

    def __init__(self, cost: StepCost, buckets: Sequence[int]) -> None:
        self._cost, self._buckets = cost, np.array(buckets)

    def rounds(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """As StepCost.rounds."""
        at = np.searchsorted(self._buckets, tokens)
        padded = self._buckets[np.minimum(at, len(self._buckets) - 1)]
        return self._cost.rounds(np.maximum(padded, tokens), context)


def padded(cost: StepCost, buckets: Sequence[int]) -> StepCost | _Padded:
    """What steps cost as they are run. Not for a search that ends at the first token that doesn't pay: there the first
    one of a size would bear the whole price of it.

    Args:
        buckets: sizes that steps are padded to; none: they are not.
    """
    return _Padded(cost, buckets) if buckets else cost


@dataclasses.dataclass
class StepCost:
    """A measured table with bilinear interpolation between its points.

    Attributes:
        tokens: rising token counts. contexts: rising context lengths.
        table: seconds[i][j] for tokens[i] at contexts[j]. It may fall in i: matrix products have sizes that they like.
        draft: seconds that drafting adds to a round (0: not measured), the same for every length: those of proposing in
            a table that learns, all of them in one that `drafting_for` made.
        hardware: where it was measured.
        drafting: of proposing, by the number of requests. committing: of telling the draft of rows of text, by their
            number, to the nearest power of two.
    """

    tokens: list[int]
    contexts: list[int]
    table: list[list[float]]
    draft: float = 0.0
    hardware: str = dataclasses.field(default_factory=device_name)
    drafting: Learned = dataclasses.field(default_factory=dict)
    committing: Learned = dataclasses.field(default_factory=dict)

    def seconds(self, tokens: int, context: int) -> float:
        """Seconds of a round that verifies `tokens` tokens in all: the target step, plus drafting."""
        return float(self.rounds(np.array([tokens]), context)[0])

    def rounds(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """Seconds of rounds of int64[N] tokens, float64[N]."""
        return self.steps(tokens, context) + self.draft

    def observe(self, tokens: int, context: int, seconds: float, together: float = 0.04, own: float = 0.01) -> None:
        """Moves the table towards a step that took `seconds` (drafting apart).

        A machine gets slower or faster for steps of all sizes, and a size that the scheduler never picks would else
        keep its first measurement for ever: `together` is the share of the error by which everything moves. Their
        differences, which decide on lengths, are smaller than what a single step is off by, so that they follow by a
        smaller share, `own`, and sizes less alike by less, half per doubling. A single step counts for an error of its
        whole cost at most, so that a hiccup of the machine moves everything by a few percent and no size by itself.
        """
        error = min(max(seconds / float(self.steps(np.array([tokens]), context)[0]) - 1, -1.0), 1.0)
        j, wj = _place(self.contexts, context)
        nearness = [0.0] * len(self.contexts)
        nearness[j] += 1 - wj
        nearness[min(j + 1, len(self.contexts) - 1)] += wj
        for t, row in zip(self.tokens, self.table, strict=True):
            alike = own * min(t / tokens, tokens / t)
            for column, near in enumerate(nearness):
                row[column] *= 1 + error * (together + alike * near)

    def steps(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """Seconds of target steps, drafting apart, of float[N] (rising or not, not only whole) tokens."""
        j, wj = _place(self.contexts, context)
        right = min(j + 1, len(self.contexts) - 1)
        column = np.array([row[j] * (1 - wj) + row[right] * wj for row in self.table])
        out = np.interp(tokens, self.tokens, column)
        if len(self.tokens) > 1:
            slope = (column[-1] - column[-2]) / (self.tokens[-1] - self.tokens[-2])
            out += slope * np.maximum(tokens - self.tokens[-1], 0)
        return np.maximum(out, 1e-9)

    def observe_draft(self, requests: int, seconds: float, rows: int = 0, committing: float = 0.0) -> None:
        """Takes in a round's drafting.

        Args:
            requests: proposed for, in so many seconds.
            rows: of text that the draft was told of before, which took `committing` seconds: those of the round before
                where each round is drafted, and all that was held back where it is not.
        """
        self.draft = seconds if self.draft == 0 else self.draft + 0.05 * min(seconds - self.draft, self.draft)
        _learn(self.drafting, requests, seconds)
        if rows:
            _learn(self.committing, 1 << round(math.log2(rows)), committing)

    def draft_seconds(self, requests: int, rows: int = 0) -> float:
        """Seconds of drafting for so many requests, `draft` where nothing was observed.

        Args:
            rows: what the draft has to be told first, where that is more than the row that each request's last round
                brought at the least.
        """
        if requests == 0:
            return 0.0
        if not self.drafting:
            return self.draft
        # Of what was never observed, a draft for more requests is taken to cost in proportion and one for fewer as
        # much: it reads all weights.
        seconds, largest = _known(self.drafting, requests), max(self.drafting)
        if requests > largest:
            seconds *= requests / largest
        return seconds + self._commit_seconds(max(rows, requests))

    def _commit_seconds(self, rows: int) -> float:
        """Seconds of telling the draft of so many rows, 0 where nothing was observed. Below the least observed number
        and beyond a single one reading the weights is taken to cost as much as that many rows, or READ_AS at least;
        above the largest of several it goes on along the line through the last two."""
        if not self.committing:
            return 0.0
        seconds, grid = _known(self.committing, rows), sorted(self.committing)
        if rows < grid[0] or len(grid) == 1:
            read = max(grid[0], READ_AS)
            return seconds * (read + rows) / (read + grid[0])
        if rows > grid[-1]:
            last, before = (self.committing[n][0] for n in grid[:-3:-1])
            seconds += max((last - before) / (grid[-1] - grid[-2]), 0.0) * (rows - grid[-1])
        return seconds

    def drafting_for(self, requests: int) -> StepCost:
        """The same table (not a copy) with the draft's cost for so many requests."""
        return dataclasses.replace(self, draft=self.draft_seconds(requests))

    def copy(self, draft: float | None = None) -> StepCost:
        """A table that learns apart from this one; with a `draft` of its own, it knows of no others."""
        return dataclasses.replace(
            self,
            table=[list(row) for row in self.table],
            draft=self.draft if draft is None else draft,
            drafting=dict(self.drafting) if draft is None else {},
            committing=dict(self.committing) if draft is None else {},
        )

    def copy_with_draft_of(self, other: StepCost) -> StepCost:
        """A table that learns apart from both, and starts from what the other one learned of its draft."""
        theirs = other.copy()
        return dataclasses.replace(
            self.copy(), draft=theirs.draft, drafting=theirs.drafting, committing=theirs.committing
        )


def _learn(known: Learned, at: int, seconds: float) -> None:
    """Takes in what `at` took. First use is dearer than what follows, so that the lesser of the first two counts; after
    them a single one moves the mean by no more than a tenth."""
    old, times = known.get(at, (seconds, 0))
    known[at] = (min(old, seconds) if times < 2 else old + 0.1 * min(seconds - old, old)), times + 1


def _known(known: Learned, at: int) -> float:
    """Seconds of `at`: between two observed numbers by interpolation, as much as the least observed below it and as the
    largest above it."""
    grid = sorted(known)
    return float(np.interp(at, grid, [known[n][0] for n in grid]))


def measure(
    run: Callable[[int, int], float],
    tokens: Sequence[int],
    contexts: Sequence[int],
    repeats: int = 8,
    far: Sequence[int] = (),
) -> StepCost:
    """Profiles `run(tokens, context) -> seconds`: repeats interleaved, lower quartiles, and of their differences what
    the repeats agree on.

    Whatever disturbs a measurement makes it longer, so the lower quartile is nearer to the truth than the mean or the
    median. On a busy machine it is still off by several percent, which is as much as the tokens at the end of a block
    are worth: a size that came out cheap by chance would be picked again and again. So a point is held against a
    roofline through all of them (`_roofline`), and keeps its distance as far as that is more than chance. A size that
    really is dear stays so: on two AVX-512 cores a step over two tokens took 43 ms where one took 38 and three to six
    37, and a table that rises by force would have the scheduler choose the dear ones.

    Args:
        far: rising contexts beyond `contexts`. Steps there are long, and differ from those at the last of `contexts` by
            their attention alone, which grows evenly: they are measured at the least, a middle and the greatest number
            of tokens, half as often, and what they add is interpolated.
    """
    few = sorted({0, (len(tokens) - 1) // 2, len(tokens) - 1})
    distant = np.empty((max(repeats // 2, 1), len(far), len(few)))
    samples = np.empty((repeats, len(contexts), len(tokens)))
    for r in range(-1, repeats):  # the first round warms up
        for j, c in enumerate(contexts):
            for i, t in enumerate(tokens):
                samples[max(r, 0), j, i] = run(t, c)
        if r % 2:
            for j, c in enumerate(far):
                for i, at in enumerate(few):
                    distant[max(r, 0) // 2, j, i] = run(tokens[at], c)
    columns = [_believed(samples[:, j], np.array(tokens, dtype=float)) for j in range(len(contexts))]
    last = columns[-1]
    for j in range(len(far)):
        added = np.maximum(_quartile(distant[:, j]) - last[few], 0.0)
        columns.append(last + np.interp(tokens, [tokens[at] for at in few], added))
    return StepCost(list(tokens), [*contexts, *far], np.stack(columns, 1).tolist())


def _quartile(samples: np.ndarray) -> np.ndarray:
    """float[T], the lower quartiles of float[R, T]."""
    return np.sort(samples, 0)[len(samples) // 4]


def _believed(samples: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float[T], costs from float[R, T] seconds: lower quartiles, drawn to the roofline as far as they are chance."""
    measured = _quartile(samples)
    picks = np.random.default_rng(0).integers(0, len(samples), (200, len(samples)))
    error = np.stack([_quartile(samples[p]) for p in picks]).std(0)
    line = _roofline(tokens, measured)
    apart = measured - line
    signal = np.clip(1 - (2 * error) ** 2 / np.maximum(apart**2, 1e-18), 0.0, 1.0)
    return line + signal * apart


def _roofline(tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """float[T]: the best a + b t + c max(t - k, 0), b and c not negative: reading the weights costs the same for any
    number of tokens, up to a number k where products start to cost more than reads. Errors count relative to costs."""
    best, least = seconds, math.inf
    for knee in (*tokens[1:-1], math.inf) if len(tokens) > 3 else ():
        parts = [np.ones_like(tokens), tokens, np.maximum(tokens - knee, 0) if math.isfinite(knee) else None]
        for chosen in ((0, 1, 2), (0, 2), (0, 1), (0,)):
            design = [parts[i] for i in chosen]
            if any(d is None for d in design):
                continue
            matrix = np.stack(design, 1) / seconds[:, None]  # type: ignore[arg-type]
            factors = np.linalg.lstsq(matrix, np.ones_like(seconds), rcond=None)[0]
            loss = float(((matrix @ factors - 1) ** 2).sum())
            if (factors[1:] >= 0).all() and loss < least:
                best, least = (matrix @ factors) * seconds, loss
    return best


def kept(path: Path, made_for: Mapping[str, Any], reach: tuple[int, int], measured: Callable[[], StepCost]) -> StepCost:
    """The table of a file where it fits, else one measured now, which becomes the file's.

    Why a file's table was not used is logged as a warning.

    Args:
        path: a JSON file {schema_version, kind, made_for, tokens, contexts, table, digest}.
        made_for: what decides on the costs (hardware, target, dtype, ...), strings and numbers; each must be equal.
        reach: tokens of the largest step and its context, which the table must go up to.
    """
    if path.exists():
        found, why = _read(path, made_for, reach)
        if found is not None:
            return found
        log.warning("engine.step_cost=%s is not used: %s. Step costs are measured anew and kept there.", path, why)
    cost = measured()
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "step_cost",
        "made_for": dict(made_for),
        "tokens": cost.tokens,
        "contexts": cost.contexts,
        "table": cost.table,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, "digest": digest_json(content)})
    return cost


def _read(path: Path, made_for: Mapping[str, Any], reach: tuple[int, int]) -> tuple[StepCost | None, str]:
    """The file's table, or None and why it doesn't fit."""
    try:
        content = json.loads(path.read_text())
        digest = content.pop("digest")
        kind, version, theirs = content["kind"], content["schema_version"], content["made_for"]
        tokens, contexts, table = content["tokens"], content["contexts"], content["table"]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        return None, f"it is no step cost file ({type(e).__name__}: {e})"
    if (kind, version) != ("step_cost", SCHEMA_VERSION):
        return None, f"it is a {kind} file of schema {version}, not a step_cost file of schema {SCHEMA_VERSION}"
    if digest_json(content) != digest:
        return None, "it was altered after it was written (its digest differs)"
    other = [f"{k} is {theirs.get(k)!r} there and {v!r} here" for k, v in made_for.items() if theirs.get(k) != v]
    if other:
        return None, "; ".join(other)
    for name, grid, most in (("tokens in a step", tokens, reach[0]), ("tokens of context", contexts, reach[1])):
        if grid[-1] < most:
            return None, f"it ends at {grid[-1]} {name}, this engine's goes up to {most}"
    return StepCost(tokens, contexts, table), ""


def _place(grid: list[int], x: int) -> tuple[int, float]:
    """Index of the cell of `x` in a rising grid, and its fraction inside, 0 and 1 beyond its ends."""
    if len(grid) == 1:
        return 0, 0.0
    i = min(max(bisect.bisect_right(grid, x) - 1, 0), len(grid) - 2)
    return i, min(max((x - grid[i]) / (grid[i + 1] - grid[i]), 0.0), 1.0)
