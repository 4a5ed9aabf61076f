"""Which rows a step gets: the same ones from the store and from the stream, wherever a run starts and however many
workers there are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import PipelineConfig, TrainerConfig, from_plain
from pipeline.errors import ConfigError, DraftlineError
from pipeline.training.feed import stored, streamed
from pipeline.training.schedule import rows_of_step
from pipeline.training.worker import History

ROWS = [SimpleNamespace(sample_id=f"{i:032x}") for i in range(11)]  # an epoch ends inside a step


def _config(**changes: Any) -> TrainerConfig:
    return TrainerConfig(**{"steps": 9, "sequences_per_step": 8, "accumulate": 2, "seed": 3, **changes})


def _ids(parts: Any) -> list[list[int]]:
    return [[int(r.sample_id, 16) for r in rows] for rows in parts]


def _streamed(config: TrainerConfig, rank: int, world: int, first: int, request_rows: int = 6, bad: int = -1) -> Any:
    asked: list[tuple[int, list[int]]] = []

    def ask(number: int, indices: list[int]) -> list[int]:
        asked.append((number, indices))
        return indices

    def get(order: list[int]) -> list[Any]:
        return [None if i == bad else ROWS[i] for i in order]

    taken = [
        (_ids(parts), lost)
        for parts, lost in streamed(
            len(ROWS),
            ask,
            get,
            config,
            rank,
            world,
            first,
            request_rows=request_rows,  # type: ignore[arg-type]
        )
    ]
    return taken, asked


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 4])
def test_store_and_stream_give_the_rows_of_the_step(world: int, first: int) -> None:
    config = _config()
    by_rank = [[_ids(p) for p in stored(ROWS, config, rank, world, first)] for rank in range(world)]  # type: ignore[arg-type]
    for rank in range(world):
        taken, _ = _streamed(config, rank, world, first)
        assert [parts for parts, _ in taken] == by_rank[rank]
    for i, number in enumerate(range(first, config.steps)):
        due = rows_of_step(number, len(ROWS), config.sequences_per_step, config.seed)
        dealt = [row for m in range(config.accumulate) for rank in range(world) for row in by_rank[rank][i][m]]
        assert dealt == due, "microbatches are consecutive pieces of the step, whatever the number of ranks"
    assert all(len(parts) == 2 and all(len(p) == 4 // world for p in parts) for parts in by_rank[0])


def test_rows_of_coming_steps_are_told_ahead_of_their_reading_until_no_more_are_wanted() -> None:
    config = _config(steps=9)
    events: list[tuple[str, list[int]]] = []

    class Store:
        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, index: int) -> Any:
            events.append(("read", [index]))
            return ROWS[index]

    def expect(rows: list[int]) -> bool:
        events.append(("told", rows))
        return sum(kind == "told" for kind, _ in events) < 6

    taken = [_ids(parts) for parts in stored(Store(), config, 1, 2, 2, expect=expect, ahead=3)]
    plain = [_ids(parts) for parts in stored(ROWS, config, 1, 2, 2)]  # type: ignore[arg-type]
    assert taken == plain
    told = [rows for kind, rows in events if kind == "told"]
    assert told == [[i for part in step for i in part] for step in plain[:6]]
    kinds = [kind for kind, _ in events]
    assert kinds[:3] == ["told"] * 3 and kinds[3:7] == ["read"] * 4 and kinds[7] == "told"


def test_a_stream_asks_ahead_within_bounds_and_once_for_each_row() -> None:
    config = _config(steps=10)
    outstanding, most = 0, 0

    def ask(number: int, indices: list[int]) -> list[int]:
        nonlocal outstanding, most
        outstanding += 1
        most = max(most, outstanding)
        assert len(indices) == 8, "two steps of four rows: as many whole steps as fit into request_rows"
        return indices

    def get(order: list[int]) -> list[Any]:
        nonlocal outstanding
        outstanding -= 1
        return [ROWS[i] for i in order]

    taken = list(streamed(len(ROWS), ask, get, config, 1, 2, 0, request_rows=9, ahead=2))  # type: ignore[arg-type]
    assert len(taken) == 10 and most == 2 and outstanding == 0
    numbers = [[n for n, _ in _streamed(config, rank, 2, 0)[1]] for rank in (0, 1)]
    assert not set(numbers[0]) & set(numbers[1]), "the ranks' requests are spread over the extracting actors"


def test_rows_without_finite_features_are_left_out_and_counted() -> None:
    config = _config()
    whole, _ = _streamed(config, 0, 1, 0)
    short, _ = _streamed(config, 0, 1, 0, bad=7)
    assert len(short) == len(whole), "the step is taken all the same"
    for (all_parts, none), (parts, lost) in zip(whole, short, strict=True):
        assert none == 0
        assert parts == [[i for i in p if i != 7] for p in all_parts]
        assert lost == sum(p.count(7) for p in all_parts)
    assert sum(lost for _, lost in short) > 0


def test_a_pass_without_any_finite_features_ends_the_run() -> None:
    config = _config(steps=50)
    passed = 0

    def get(order: list[int]) -> list[Any]:
        nonlocal passed
        passed += len(order)
        return [None] * len(order)

    with pytest.raises(DraftlineError, match="a whole pass, are not finite. Use features.compute_dtype=float32"):
        for _ in streamed(len(ROWS), lambda _, indices: indices, get, config, 0, 2, 0, request_rows=4):
            pass
    assert len(ROWS) // 2 <= passed < len(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 3}, "trainer.sequences_per_step=4 must be a multiple of trainer.workers=2 times"),
        ({"accumulate": 0}, "trainer.accumulate=0 must be above 0"),
        ({"normalise": "rows"}, "trainer.normalise='rows' is not one of tokens, microbatches"),
        ({"ema": 1.0}, "trainer.ema=1.0 must be at least 0 and below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(PipelineConfig, {"trainer": change})


def test_a_report_that_a_kill_cut_short_is_taken_again(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [r["step"] for r in History.read(file)] == [1, 2]
    History(file, first=1)
    assert file.read_text() == '{"step": 1}\n'


def test_every_row_is_used_once_per_epoch_whatever_step_a_run_starts_from() -> None:
    rows, per_step = 12, 4
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in rows_of_step(step, rows, per_step, 5)] for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert rows_of_step(7, rows, per_step, 5) == epochs[2][4:8]
