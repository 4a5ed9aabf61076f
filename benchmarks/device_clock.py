"""Times calls on a CUDA device, replayed from a CUDA graph where they can be captured, and prints tables of them.

Launched one by one from Python, a kernel of 50 microseconds takes as long as its launch does: such a time says nothing
of the kernel, and a step that is captured in a CUDA graph doesn't pay it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Spent:
    """Median milliseconds of a call.

    Attributes:
        ms: of the replayed graph, or `eager` where there is none.
        eager: launched from Python.
        why_eager: why it can't be captured; empty where it was.
    """

    ms: float
    eager: float
    why_eager: str = ""

    def __str__(self) -> str:
        return f"{self.ms:.3f}{' e' if self.why_eager else '  '}"


class Clock:
    """Times calls: medians of `repeats`, cache flushed before each."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, before: Call = lambda: None) -> Spent:
        """Of `call`, which must read and write the same tensors each time; `before` restores them, untimed."""
        eager = self._median(call, before)
        before()
        replay, why = capture(call)
        return Spent(eager, eager, why) if replay is None else Spent(self._median(replay, before), eager)

    def _median(self, call: Call, before: Call) -> float:
        for _ in range(3):
            before()
            call()
        spent = []
        for _ in range(self.repeats):
            before()
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            spent.append(begin.elapsed_time(end))
        return statistics.median(spent)


def capture(call: Call) -> tuple[Call | None, str]:
    """What replays a call that has run before, from a CUDA graph; or None and why it can't be captured."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    # What waits for the device can't be captured. It is found before: a capture that fails leaves the allocator and
    # the random generator as if it went on.
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            call()
    except Exception as error:  # a compiler wraps what it meets
        return None, _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        # `torch.cuda.graph` leaves its own stream the current one where ending the capture fails.
        torch.cuda.set_stream(here)
        torch.cuda.synchronize()
        return None, _first_line(error)
    return graph.replay, ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


class Table:
    """Prints a line per kernel as it is timed.

    Args:
        bandwidth: GB/s of a copy.
    Attributes:
        rows: what was printed, by name.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.rows: list[dict[str, Any]] = []
        print("ms: replayed from a CUDA graph; eager: launched from Python; e: eager too, it can't be captured")
        print(f"{'kernel':<42}{'ms':>11}{'eager':>8}{'GB/s':>7}{'of copy':>9}{'reference':>12}{'compiled':>11}")

    def add(
        self,
        name: str,
        size: int,
        kernel: Spent,
        reference: Spent,
        compiled: Spent | str,
        others: dict[str, Spent | str] | None = None,
    ) -> None:
        """A kernel that has to move `size` bytes, its reference, that compiled, and others; a string says what happened
        in place of a time."""
        rate = size / kernel.ms / 1e6
        share = rate / self.bandwidth
        figures = f"{kernel!s:>11}{kernel.eager:>8.3f}{rate:>7.0f}{share:>9.0%}{reference!s:>12}{compiled!s:>11}"
        print(f"{name:<42}{figures}", flush=True)
        if kernel.why_eager:
            print(f"  not captured: {kernel.why_eager}", flush=True)
        for other, spent in (others or {}).items():
            print(f"  {other:<40}{spent!s:>11}", flush=True)
        said = {"reference": reference, "compiled": compiled, **(others or {})}
        against = {n: s if isinstance(s, str) else dataclasses.asdict(s) for n, s in said.items()}
        entry = {"kernel": name, **dataclasses.asdict(kernel), "bytes": size, "gb_per_s": rate, "of_copy": share}
        self.rows.append({**entry, "against": against})
