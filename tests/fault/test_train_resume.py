"""A training worker is killed in the middle: the run goes on and ends as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from pipeline.config import TargetConfig
from pipeline.target import load_target
from pipeline.training.schedule import rows_of_step
from tests.training.runs import TIMINGS, Signaller, make_features, make_place, reported

STEPS, EVERY = 18, 6


def test_every_row_is_used_once_per_epoch_whatever_step_a_run_starts_from() -> None:
    rows, per_step = 12, 4
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in rows_of_step(step, rows, per_step, 5)] for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert rows_of_step(7, rows, per_step, 5) == epochs[2][4:8]


@pytest.mark.timeout(600)  # three starts of two workers: about a minute alone, several on a crowded machine
@pytest.mark.ray
@pytest.mark.fault
def test_a_killed_worker_changes_neither_the_loss_curve_nor_the_draft(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        killer = Signaller(tmp_path / "killed", signal.SIGKILL, after=EVERY + 1, but=EVERY)
        killer.start()
        # Weights learned on the way are state that a checkpoint must hold, too.
        settings = {"steps": STEPS, "checkpoint_every": EVERY, "position_weights": "survival", "lk": 0.2}
        target = load_target(TargetConfig(path="tiny"), place.cache)
        features = make_features(target, place.corpus, tmp_path / "masked", masked=(3, 11))
        killed = place.train("killed", settings, features=features)
        assert EVERY < killer.sent_after < STEPS, "no worker was killed while the run was going"
        whole = place.train("whole", settings, features=features)
    finally:
        ray.shutdown()

    curves = [[{k: v for k, v in r.items() if k not in TIMINGS} for r in reported(d)] for d in (killed, whole)]
    assert [r["step"] for r in curves[0]] == list(range(1, STEPS + 1)), "each step once in the history that counts"
    assert curves[0] == curves[1]
    weights = [load_file(d / "draft" / "model.safetensors") for d in (killed, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert curves[1][-1]["loss"] < curves[1][0]["loss"]
    assert curves[1][0]["weight_3"] != curves[1][1]["weight_3"] != curves[1][-1]["weight_3"]
    skipped = [r["skipped_samples"] for r in curves[0]]
    assert skipped == sorted(skipped) and 0 < skipped[EVERY - 1] < skipped[-1], "counted on over the kill"
