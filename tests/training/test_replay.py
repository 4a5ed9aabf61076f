"""A step whose loss is not finite can be taken again from what it left, also after another run has started."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ArtifactError
from pipeline.features.store import FeatureRow
from pipeline.target import Target
from pipeline.training import replay
from pipeline.training.step import TrainStep, Weights
from tests.drafts.samples import small_draft
from tests.training.test_step import _row

NUMBER = 7


def _feature_row(target: Target, length: int, seed: int, *, spoilt: bool = False, masked: bool = False) -> FeatureRow:
    made = _row(target, length, seed)
    taps = made.taps.bfloat16()
    if spoilt:
        taps[0] = float("nan")
    mask = made.loss_mask & (not masked)
    return FeatureRow(made.sample_id, made.input_ids.long(), mask, taps, made.last_hidden.bfloat16())


def _step(target: Target) -> TrainStep:
    return TrainStep(small_draft(target), target.family.lm_head.weight, Weights(), num_anchors=3, seed=5)


def _failed(target: Target, history: Path) -> tuple[TrainStep, list[Any]]:
    step = _step(target)
    parts = [
        [_feature_row(target, 30, 1), _feature_row(target, 14, 2, masked=True)],
        [_feature_row(target, 41, 3, spoilt=True)],
    ]
    losses = [step(rows, NUMBER)[0].item() for rows in parts]
    assert [math.isfinite(v) for v in losses] == [True, False]
    weights = list(step.draft.trainable_state().items())
    for rank in (1, 0):
        replay.keep(
            history,
            step,
            parts,
            NUMBER,
            rank,
            2,
            learning_rate=1e-3,
            loss=losses[1],
            what="loss is",
            draft=iter(weights),
        )
    return step, [parts, losses]


def test_the_step_can_be_taken_again_after_the_next_run_has_begun(tiny: Target, tmp_path: Path) -> None:
    history = tmp_path / "history-abc.jsonl"
    failed, (parts, losses) = _failed(tiny, history)
    left = replay.left(history)
    assert left is not None
    number, what, files = left
    assert (number, what) == (NUMBER, "loss is")
    assert [f.name.split("-rank-")[1] for f in files] == ["0-of-2.json", "1-of-2.json"]

    replay.begin(history)
    assert replay.left(history) is None, "the next run is not blamed for it"
    for file in files:
        kept = replay.read(file)
        again = _step(tiny)
        for weight in again.draft.parameters():
            weight.data.zero_()
        again.draft.load_state_dict(kept.draft)
        again.weigh_positions(kept.position_weights)
        assert (again.num_anchors, again.seed, kept.step) == (kept.num_anchors, kept.seed, NUMBER)
        assert kept.learning_rate == 1e-3 and math.isnan(kept.loss)
        replayed = [again(rows, kept.step)[0].item() for rows in kept.microbatches]
        assert replayed[0] == losses[0] and math.isnan(replayed[1])
        for mine, theirs, anchors in zip(kept.microbatches, parts, kept.anchors, strict=True):
            for a, b, at in zip(mine, theirs, anchors, strict=True):
                blocks = failed.blocks_of(b, NUMBER)
                assert a.sample_id == b.sample_id and (at is None) == (blocks is None)
                assert blocks is None or torch.equal(at, blocks.anchors)
        assert kept.anchors[0][1] is None


def test_of_large_rows_the_ids_are_kept(tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LARGEST", 100)
    _failed(tiny, tmp_path / "history-abc.jsonl")
    left = replay.left(tmp_path / "history-abc.jsonl")
    assert left is not None
    assert f"{3:032x}" in left[2][0].read_text()
    with pytest.raises(ArtifactError, match="are not kept.*read them from the features"):
        replay.read(left[2][0])
