"""A rank's rows, step by step: read from the store, or streamed from extraction. Both give the same rows at the same
step, whichever step a run starts from and however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pipeline.config import TrainerConfig
from pipeline.errors import DraftlineError
from pipeline.training.schedule import microbatches_of_step
from pipeline.training.step import Row

Microbatches = list[list[Row]]


class Rows(Protocol):
    """Rows by index (a FeatureStore, a list)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


def stored(
    store: Rows,
    config: TrainerConfig,
    rank: int,
    world: int,
    first: int,
    *,
    expect: Callable[[list[int]], bool] = lambda _: False,
    ahead: int = 64,
) -> Iterator[Microbatches]:
    """The microbatches of every step from `first` on.

    Args:
        expect: told of the rows of coming steps, `ahead` steps before they are read, until it wants to hear no more.
    """

    def due(step: int) -> list[list[int]]:
        return microbatches_of_step(step, len(store), config, rank, world)

    told, more = first, True
    for step in range(first, config.steps):
        while more and told < min(step + ahead, config.steps):
            more = expect([i for part in due(told) for i in part])
            told += 1
        yield [[store[i] for i in part] for part in due(step)]


def streamed(
    rows: int,
    ask: Callable[[int, list[int]], Any],
    get: Callable[[Any], Sequence[Row | None]],
    config: TrainerConfig,
    rank: int,
    world: int,
    first: int,
    *,
    request_rows: int,
    ahead: int = 2,
) -> Iterator[tuple[Microbatches, int]]:
    """The microbatches of every step from `first` on, with how many rows of the step had no finite features (they are
    left out: a rank that is a row short still takes the step).

    Args:
        rows: of the split that is streamed.
        ask: orders features of row indices; its first argument numbers the requests of all ranks. get: waits for what
            was ordered; None where features are not finite.
        request_rows: rows per order, at least a step's. ahead: orders that are out while one is being used, which
            bounds what waits in memory.
    Raises:
        DraftlineError: this rank's share of a whole pass over the rows gave no finite features.
    """
    share = config.sequences_per_step // world
    steps_each = max(1, request_rows // share)
    starts = list(range(first, config.steps, steps_each))

    def order(at: int) -> Any:
        wanted = [
            i
            for step in range(starts[at], min(starts[at] + steps_each, config.steps))
            for part in microbatches_of_step(step, rows, config, rank, world)
            for i in part
        ]
        return ask(at * world + rank, wanted)

    orders = [order(at) for at in range(min(ahead, len(starts)))]
    size = share // config.accumulate
    seen, usable = 0, False
    for at in range(len(starts)):
        made = list(get(orders.pop(0)))
        seen, usable = seen + len(made), usable or any(r is not None for r in made)
        if not usable and seen >= -(-rows // world):
            raise DraftlineError(
                f"The features of {seen} rows, a whole pass, are not finite. Use features.compute_dtype=float32, or "
                "check the target's weights."
            )
        if at + ahead < len(starts):
            orders.append(order(at + ahead))
        for start in range(0, len(made), share):
            step = made[start : start + share]
            parts = [[r for r in step[i : i + size] if r is not None] for i in range(0, share, size)]
            yield parts, sum(r is None for r in step)
