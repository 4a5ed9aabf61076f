"""Training on several workers: asked to stop, gone on with, by as many workers or another number, from the store or
streamed. Every run here is a real one (Ray Train, DeepSpeed, two processes)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train.v2.api.preemption import PreemptionInfo
from safetensors.torch import load_file

from pipeline.artifact import digest_json
from pipeline.config import TargetConfig
from pipeline.corpus.build import read_rows
from pipeline.errors import DraftlineError
from pipeline.target import load_target
from pipeline.training import replay
from pipeline.training.average import read_average
from pipeline.training.preemption import HeedSigterm
from pipeline.training.schedule import rows_of_step
from tests.training.runs import TIMINGS, Place, Signaller, curve, make_features, make_place, reported

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = 30
COMMON: dict[str, Any] = {
    "steps": STEPS, "checkpoint_every": 100, "ema": 0.9, "position_weights": "survival", "lk": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = make_place(tmp_path_factory.mktemp("sharded"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield made
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """Two workers, all through."""
    return place.train("whole", COMMON)


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    """One worker, all through."""
    return place.train("alone", {**COMMON, "workers": 1})


def _stopped(place: Place, name: str, changes: dict[str, Any], *, to_job: bool, **more: Any) -> tuple[int, int]:
    """Starts a run and sends it SIGTERM; returns the step reported before, and the one it saved."""
    signaller = Signaller(place.path / name, signal.SIGTERM, after=2, but=100, to_job=to_job)
    signaller.start()
    with pytest.raises(DraftlineError, match=rf"asked to stop \(SIGTERM\) and saved step \d+ of {STEPS}") as stop:
        place.train(name, changes, **more)
    signaller.join()
    return signaller.sent_after, int(str(stop.value).split("saved step ")[1].split()[0])


def _checkpoint(run: Path) -> Path:
    (folder,) = run.glob("train/draft-*/step_*")
    return folder


@pytest.mark.fault
def test_a_killed_worker_changes_neither_the_loss_curve_nor_the_draft(place: Place, whole: Path) -> None:
    every = 6
    killer = Signaller(place.path / "killed", signal.SIGKILL, after=every + 1, but=every)
    killer.start()
    killed = place.train("killed", {**COMMON, "checkpoint_every": every})
    killer.join()
    assert every < killer.sent_after < STEPS, "no worker was killed while the run was going"
    assert killer.begun_again, "no worker began again"
    curves = [[{k: v for k, v in r.items() if k not in TIMINGS} for r in reported(d)] for d in (killed, whole)]
    assert [r["step"] for r in curves[0]] == list(range(1, STEPS + 1)), "each step once in the history that counts"
    assert curves[0] == curves[1]
    weights = [load_file(d / "draft" / "model.safetensors") for d in (killed, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert curves[1][-1]["loss"] < curves[1][0]["loss"]
    skipped = [r["skipped_samples"] for r in curves[0]]
    assert skipped == sorted(skipped) and 0 < skipped[every - 1] < skipped[-1], "counted on over the kill"
    assert curves[1][0]["weight_3"] != curves[1][1]["weight_3"] != curves[1][-1]["weight_3"]


@pytest.mark.fault
def test_two_workers_stopped_by_sigterm_are_gone_on_with_by_one(place: Place, whole: Path) -> None:
    before, saved = _stopped(place, "moved", COMMON, to_job=False)
    run = place.path / "moved"
    assert before < saved < STEPS, "saved at the boundary of the step after the signal, not at the end"
    assert [r["step"] for r in reported(run)] == list(range(1, saved + 1))
    assert _checkpoint(run).name == f"step_{saved:06d}"
    assert not (run / "draft").exists()
    _has_nothing_borrowed(_checkpoint(run))

    (history,) = run.glob("train/history-*.jsonl")
    stale = Path(tempfile.gettempdir()) / f"draftline-{digest_json(str(history))[:12]}-checkpoint-of-a-killed-worker"
    stale.mkdir()
    rows = place.corpus / "rows-train.parquet"
    content = rows.read_bytes()
    rows.write_bytes(bytes(len(content)))  # bigrams would be counted from it: a start is not computed again
    try:
        place.train("moved", {**COMMON, "workers": 1})
    finally:
        rows.write_bytes(content)
    assert not stale.exists()
    assert [r["step"] for r in reported(run)] == list(range(1, STEPS + 1))
    assert curve(run) == pytest.approx(curve(whole), rel=1e-5)
    mine, theirs = (load_file(d / "draft" / "model.safetensors") for d in (run, whole))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-6)
    last = _checkpoint(whole)
    trained = torch.load(next(last.glob("deepspeed/*model_states.pt")), weights_only=False)["module"]
    assert torch.equal(theirs["fc.weight"], read_average(last)["draft.fc.weight"]), "published: the running average"
    assert not torch.allclose(theirs["fc.weight"], trained["draft.fc.weight"], rtol=1e-3)


def _has_nothing_borrowed(checkpoint: Path) -> None:
    """The target's embedding and output rows are in no file, by name or by size."""
    files = sorted(checkpoint.glob("deepspeed/*.pt"))
    assert [f.name for f in files if "optim" in f.name] == [
        f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)
    ]
    model = torch.load(next(f for f in files if "model_states" in f.name), weights_only=False)
    names = set(model["module"])
    assert {"draft.fc.weight", "draft.d2t", "draft.markov_head.markov_w1.weight"} <= names
    assert not names & {"draft.embed", "draft.lm_rows"}
    trained = [name for group in model["param_shapes"] for name in group]
    assert all(name in names for name in trained)
    numbers = sum(model["module"][name].numel() for name in trained)
    # Whole weights once, and over the ranks fp32 weights and two moments, 4 bytes each; the average once.
    whole = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    assert whole < 4 * 5 * numbers + 30_000, "the smallest borrowed matrix has 32 KiB, the rest is names"
    assert json.loads((checkpoint / "meta.json").read_text())["world"] == 2


@pytest.mark.fault
def test_a_streamed_run_that_was_stopped_takes_the_rows_it_is_due(place: Place, whole: Path) -> None:
    """Streamed and stored features are the same, and so are rows and order: the curves agree, stopped and gone on with
    by one worker instead of two that accumulate."""
    handler = signal.getsignal(signal.SIGTERM)
    _, saved = _stopped(place, "streamed", {**COMMON, "mode": "stream", "accumulate": 2}, to_job=True)
    assert 2 < saved < STEPS
    assert signal.getsignal(signal.SIGTERM) is handler, "SIGTERM means again what it did"
    run = place.train("streamed", {**COMMON, "mode": "stream", "workers": 1})
    assert [r["step"] for r in reported(run)] == list(range(1, STEPS + 1))
    assert curve(run) == pytest.approx(curve(whole), rel=1e-3)
    assert all(r["starved_seconds"] > 0 for r in reported(run))


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(place: Place) -> None:
    target = load_target(TargetConfig(path="tiny"), place.cache)
    features = make_features(target, place.corpus, place.path / "spoilt", spoilt=0)
    with pytest.raises(
        DraftlineError, match=r"loss is not finite at step \d+\. The samples of that step are in"
    ) as stop:
        place.train("spoilt-run", {**COMMON, "workers": 1}, features=features)
    (file,) = (place.path / "spoilt-run" / "train").glob("*-not-finite-*.json")
    assert file.name in str(stop.value)
    kept = json.loads(file.read_text())
    assert read_rows(place.corpus, "train")[0].sample_id in kept["sample_ids"]
    assert len(kept["sample_ids"]) == 4
    again = replay.read(file)
    assert (again.step, [len(rows) for rows in again.microbatches]) == (kept["step"], [4])
    assert any(bool(row.taps.isnan().any()) for row in again.microbatches[0])
    assert {"fc.weight", "d2t"} <= again.draft.keys() and all(bool(t.isfinite().all()) for t in again.draft.values())
    assert [r["step"] for r in reported(place.path / "spoilt-run")] == list(range(1, kept["step"] + 1))
    assert not (place.path / "spoilt-run" / "draft").exists()


def test_features_of_another_target_are_refused_before_a_worker_starts(place: Place) -> None:
    target = load_target(TargetConfig(path="tiny"), place.cache)
    target.identity = dataclasses.replace(target.identity, revision="another")
    features = make_features(target, place.corpus, place.path / "foreign")
    with pytest.raises(DraftlineError, match="belongs to another target: its revision is 'another'"):
        place.train("foreign-run", COMMON, features=features)
    assert not (place.path / "foreign-run").exists()


@pytest.mark.slow
@pytest.mark.fault
def test_ranks_without_anything_to_learn_from_hang_nobody(place: Place) -> None:
    """Three rows of four are masked: with ZeRO-3 and one row per microbatch, most are empty on some rank. They are
    counted on where a run was stopped and goes on."""
    target = load_target(TargetConfig(path="tiny"), place.cache)
    kept = range(0, 24, 4)
    features = make_features(
        target, place.corpus, place.path / "masked", masked=[i for i in range(24) if i not in kept]
    )
    zero3 = {"zero_optimization": {"stage": 3}}
    _stopped(place, "masked-3", {**COMMON, "accumulate": 2}, to_job=False, deepspeed=zero3, features=features)
    sharded = place.train("masked-3", {**COMMON, "accumulate": 2}, zero3, features=features)
    alone = place.train("masked-1", {**COMMON, "workers": 1}, features=features)
    assert curve(sharded) == pytest.approx(curve(alone), rel=1e-5)
    skipped = [r["skipped_samples"] for r in reported(sharded)]
    assert skipped == [r["skipped_samples"] for r in reported(alone)]
    rows = len(read_rows(place.corpus, "train"))
    due = [rows_of_step(n, rows, 4, 0) for n in range(STEPS)]
    assert skipped == list(itertools.accumulate(sum(i not in kept for i in step) for step in due))


class _Noticed(HeedSigterm):
    """Ray's word that a node will go away, given to every worker as Ray's own watcher gives it."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        super().after_worker_group_start(worker_group)
        for worker in worker_group.get_workers():
            ray.get(worker.actor.mark_preempt.remote(PreemptionInfo(None, {worker.metadata.node_id: [0]})))


@pytest.mark.slow
def test_rays_notice_of_preemption_makes_a_checkpoint_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.trainer.HeedSigterm", _Noticed)
    run = place.train("noticed", {**COMMON, "workers": 1, "log_every": 2})
    saved = sorted(f.name for f in run.glob("train/draft-*/step_*"))
    assert saved == ["step_000002", f"step_{STEPS:06d}"], "at the first report, once, and at the end as always"


OFFLOAD = {"device": "cpu", "pin_memory": True}
# Tensors as small as these are otherwise left whole on every rank.
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "zero 1": ({"zero_optimization": {"stage": 1}}, 1e-5),
    "zero 3": (ZERO_3, 1e-5),
    "zero 2, optimizer on the CPU": ({"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}}, 1e-5),
    "zero 1, bf16": ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, 3e-2),
    "zero 3, bf16": ({**ZERO_3, "bf16": {"enabled": True}}, 3e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_sharding_trains_the_same_draft(place: Place, alone: Path, kind: str) -> None:
    deepspeed, tolerance = KINDS[kind]
    run = place.train(kind, {**COMMON, "accumulate": 2}, deepspeed)
    assert curve(run) == pytest.approx(curve(alone), rel=tolerance)
    mine, theirs = (load_file(d / "draft" / "model.safetensors") for d in (run, alone))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert mine[name].dtype == weight.dtype, name
        if weight.is_floating_point():
            # AdamW's steps have the size of the learning rate whatever the gradient's: bf16 may turn a few around.
            torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-5 if tolerance < 1e-3 else 1e-2)
        else:
            assert torch.equal(mine[name], weight), name


@pytest.mark.slow
def test_matrices_of_the_draft_s_own_are_trained_and_sharded(place: Place) -> None:
    """ZeRO-3 on two workers against one worker: the same curve, and the matrices have moved."""
    own = {"own_embedding": True, "own_lm_head": True}
    sharded = place.train("own-3", COMMON, ZERO_3, draft=own)
    alone = place.train("own-1", {**COMMON, "workers": 1}, draft=own)
    assert curve(sharded) == pytest.approx(curve(alone), rel=1e-5)
    mine, theirs = (load_file(d / "draft" / "model.safetensors") for d in (sharded, alone))
    target = load_target(TargetConfig(path="tiny"), place.cache)
    starts = {"embed": target.family.embed_tokens.weight, "lm_rows": target.lm_head_weight[theirs["d2t"]]}
    for name, start in starts.items():
        # A token that hardly occurs has gradients of rounding's size, and AdamW's steps are not.
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(theirs[name], start.detach(), rtol=1e-3), name


@pytest.mark.slow
@pytest.mark.fault
def test_zero_3_goes_on_with_another_number_of_workers(place: Place, alone: Path) -> None:
    sharded = {"zero_optimization": {"stage": 3}}
    _stopped(place, "moved3", {**COMMON, "workers": 1}, to_job=False, deepspeed=sharded)
    run = place.train("moved3", COMMON, sharded)
    assert [r["step"] for r in reported(run)] == list(range(1, STEPS + 1))
    assert curve(run) == pytest.approx(curve(alone), rel=1e-5)
