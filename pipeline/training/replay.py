"""What a step whose loss or gradients are not finite leaves behind, so that it can be taken again alone, after other
runs too.

<history>-not-finite-step-7-rank-0-of-2.json         the step, its rows with their anchors, what weighs them
<history>-not-finite-step-7-rank-0-of-2.safetensors  the rows themselves, where they are not too large
<history>-not-finite-step-7-draft.safetensors        the draft's weights before the step, float32
<history>-not-finite.json                            that the run which just ended did so because of it

replay = read(file)
draft.load_state_dict(replay.draft, strict=False)
step = TrainStep(draft, lm_head, weights, num_anchors=replay.num_anchors, seed=replay.seed)
step.weigh_positions(replay.position_weights)
losses = [step(rows, replay.step)[0] for rows in replay.microbatches]
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifact import write_json
from pipeline.errors import ArtifactError
from pipeline.features.store import FeatureRow
from pipeline.training.step import Row, TrainStep

LARGEST = 1 << 30
"""Most bytes of rows that a rank keeps; of more it keeps ids and anchors alone."""
_TENSORS = ("input_ids", "loss_mask", "taps", "last_hidden")


@dataclasses.dataclass(frozen=True)
class Replay:
    """One rank's part of a step.

    Attributes:
        step, seed, num_anchors: which give the same anchors again (`anchors`: int64[A] per row, None without a block).
        learning_rate, loss: the step's, this rank's.
        position_weights: float32[K]. microbatches: its rows. draft: its tensors by name
            (`Draft.trainable_state`).
    """

    step: int
    seed: int
    num_anchors: int
    learning_rate: float
    loss: float
    position_weights: Tensor
    microbatches: list[list[FeatureRow]]
    anchors: list[list[Tensor | None]]
    draft: dict[str, Tensor]


def keep(
    history: Path,
    step: TrainStep,
    parts: list[list[Row]],
    number: int,
    rank: int,
    world: int,
    *,
    learning_rate: float,
    loss: float,
    what: str,
    draft: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes this rank's part of a step, and rank 0 the draft; every rank calls it.

    Args:
        number: the step's. parts: the rank's microbatches. what: is not finite ("loss is", "gradients are").
        draft: its tensors before the step, by name; every rank goes through them, as they may have to be gathered.
    """
    weights: dict[str, Tensor] = {}
    for name, weight in draft:
        if rank == 0:
            weights[name] = weight.detach().cpu()
    file = _file(history, number, rank, world)
    rows = [row for part in parts for row in part]
    size = sum(t.numel() * t.element_size() for row in rows for t in (row.taps, row.last_hidden, row.input_ids))
    file.with_suffix(".safetensors").unlink(missing_ok=True)  # of a run before that failed here likewise
    if size <= LARGEST:
        named = {f"{i}.{n}": getattr(row, n) for i, row in enumerate(rows) for n in _TENSORS}
        _save(named, file.with_suffix(".safetensors"))
    if rank == 0:
        _save(weights, _draft_file(history, number))
        write_json(_marker(history), {"step": number, "world": world, "what": what})
    blocks = [step.blocks_of(row, number) for row in rows]
    write_json(
        file,
        {
            "step": number,
            "rank": rank,
            "world": world,
            "seed": step.seed,
            "num_anchors": step.num_anchors,
            "learning_rate": learning_rate,
            "loss": str(loss),  # JSON has no word for it
            "position_weights": step.position_weights.tolist(),
            "microbatches": [len(part) for part in parts],
            "sample_ids": [row.sample_id for row in rows],
            "anchors": [None if b is None else b.anchors.tolist() for b in blocks],
            "tensors": size <= LARGEST,
        },
    )


def read(file: Path) -> Replay:
    """One rank's part of a step, from the JSON file of it.

    Raises:
        ArtifactError: the rows were too large to be kept, or are gone.
    """
    kept = json.loads(file.read_text())
    rows_file = file.with_suffix(".safetensors")
    draft_file = file.with_name(f"{file.name.split('-rank-')[0]}-draft.safetensors")
    for needed in (rows_file, draft_file):
        if not needed.is_file():
            raise ArtifactError(
                f"{needed} is missing: rows above {LARGEST >> 30} GiB are not kept. {file.name} names the samples; "
                "read them from the features."
            )
    tensors = load_file(rows_file)
    rows = [FeatureRow(name, *(tensors[f"{i}.{n}"] for n in _TENSORS)) for i, name in enumerate(kept["sample_ids"])]
    anchors = [None if a is None else torch.tensor(a, dtype=torch.int64) for a in kept["anchors"]]
    return Replay(
        kept["step"],
        kept["seed"],
        kept["num_anchors"],
        kept["learning_rate"],
        float(kept["loss"]),
        torch.tensor(kept["position_weights"]),
        _parted(rows, kept["microbatches"]),
        _parted(anchors, kept["microbatches"]),
        load_file(draft_file),
    )


def begin(history: Path) -> None:
    """For a new run: forgets that the one before ended this way. What it kept stays."""
    _marker(history).unlink(missing_ok=True)


def left(history: Path) -> tuple[int, str, list[Path]] | None:
    """The step that was not finite, what of it ("loss is", "gradients are"), and its files, one per rank; None if the
    run did not end this way."""
    if not _marker(history).is_file():
        return None
    said = json.loads(_marker(history).read_text())
    files = [_file(history, said["step"], rank, said["world"]) for rank in range(said["world"])]
    return said["step"], said["what"], [f for f in files if f.is_file()]


def _marker(history: Path) -> Path:
    return history.with_name(f"{history.stem}-not-finite.json")


def _file(history: Path, number: int, rank: int, world: int) -> Path:
    return history.with_name(f"{history.stem}-not-finite-step-{number}-rank-{rank}-of-{world}.json")


def _draft_file(history: Path, number: int) -> Path:
    return history.with_name(f"{history.stem}-not-finite-step-{number}-draft.safetensors")


def _parted(items: list[Any], sizes: list[int]) -> list[list[Any]]:
    remaining = iter(items)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # Copies: rows of a shard are parts of one storage, which safetensors refuses.
        save_file({n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
