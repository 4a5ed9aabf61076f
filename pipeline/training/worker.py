"""What runs on every training worker: DeepSpeed around TrainStep, microbatches, checkpoints.

Everything a step depends on (rows, anchors, learning rate) is a function of (config, step), so a resumed run takes
exactly the steps an uninterrupted one would have taken.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifact import digest_json, write_json
from pipeline.config import FeaturesConfig, TargetConfig, TrainerConfig, from_plain
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import save_draft
from pipeline.drafts.config import DraftConfig
from pipeline.features.store import FeatureStore, check_identity
from pipeline.features.stream import FeatureStream
from pipeline.target import load_borrowed, load_target
from pipeline.training import checkpoints, feed, replay
from pipeline.training.average import Average, whole
from pipeline.training.engine import Objective, make_engine, take_step
from pipeline.training.objectives import SurvivalWeights
from pipeline.training.preemption import Listener
from pipeline.training.schedule import learning_rate
from pipeline.training.start import blank_draft, share, warm_start
from pipeline.training.step import Row, StepMetrics, TrainStep, Weights

COUNTS = ("skipped_samples", "not_finite_samples")
"""Metrics that add up over a run, however often it is stopped."""


@dataclasses.dataclass(frozen=True)
class WorkerPlan:
    """Plain values that describe a training run (see `pipeline.training.trainer.train`)."""

    target: dict[str, Any]
    draft: dict[str, Any]
    trainer: dict[str, Any]
    features: dict[str, Any]
    deepspeed: dict[str, Any]
    cache_dir: str
    corpus_dir: str
    features_dir: str
    former_dir: str
    out: str
    history: str
    storage: str
    manifest_config: dict[str, Any]
    inputs: dict[str, str]


def train_worker(plan: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        plan: the fields of a WorkerPlan, with `bell` (see `pipeline.training.preemption`) and `stream` (a FeatureStream
            or None) beside them.
    """
    import ray.train.torch
    import torch.distributed as dist

    # Ray Train's INFO repeats every report in Python's own notation; history.jsonl and the progress lines hold it too.
    logging.disable(logging.INFO)
    plan = dict(plan)
    bell, stream = plan.pop("bell"), plan.pop("stream")
    p = WorkerPlan(**plan)
    config = from_plain(TrainerConfig, p.trainer, "trainer")
    features = from_plain(FeaturesConfig, p.features, "features")
    torch.set_num_threads(config.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    listener = Listener(bell, rank)
    run = digest_json(p.history)[:12]
    if context.get_local_rank() == 0:
        checkpoints.clear(run)
    # On the CPU wherever the target decodes: of it only the borrowed matrices go to the training device.
    where = dataclasses.replace(from_plain(TargetConfig, p.target, "target"), device="cpu")
    target = load_borrowed(where, Path(p.cache_dir))
    identity = target.identity.as_dict()
    store = None
    if stream is None:
        store = FeatureStore(p.features_dir)
        check_identity(store.manifest, identity, p.features_dir)
    corpus = Path(p.corpus_dir)
    draft = blank_draft(from_plain(DraftConfig, p.draft, "draft"), config, target, corpus)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and rank == 0:
        former = Path(p.former_dir) if p.former_dir else None
        read = functools.partial(load_target, where, Path(p.cache_dir))
        warm_start(draft, config, target, corpus, store or (), former, whole=read)
    device = ray.train.torch.get_device() if config.use_gpu else torch.device("cpu")
    draft.to(device)
    if checkpoint is None:
        share(draft)
    half = bool((p.deepspeed.get("bf16") or {}).get("enabled"))
    step = TrainStep(
        draft,
        target.lm_head_weight,
        Weights(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Weights)}),
        num_anchors=config.num_anchors,
        seed=config.seed,
        autocast=torch.bfloat16 if half else getattr(torch, config.autocast) if config.autocast else None,
        chunk=config.chunk_rows,
    )
    del target

    def reduce(t: Tensor) -> Tensor:
        t = t.to(device)
        dist.all_reduce(t)
        return t

    stage = int(p.deepspeed["zero_optimization"]["stage"])
    objective = Objective(step)
    survival = None
    if config.position_weights == "survival":
        survival = SurvivalWeights(draft.config.tokens_per_block, config.survival_floor, config.survival_memory)
    first = 0
    gather = half or stage == 3
    counted = dict.fromkeys(COUNTS, 0.0)  # since the run began: what a checkpoint holds of them is rank 0's
    with checkpoints.opened(checkpoint, run=run, world=world, local_rank=context.get_local_rank()) as past:
        engine, optimizer = make_engine(objective, p.deepspeed, config, world, past is not None and past.universal)
        average = None
        if config.ema:
            average = Average(engine.module.named_parameters(), config.ema, rank, world, gather)
        if past is not None:
            past.load(engine, average)
            first = past.step
            if survival is not None:
                survival.load(past.survival)
            if rank == 0:
                counted |= {name: past.counts.get(name, 0.0) for name in COUNTS}
                moved = f" with {world} workers instead of {past.world}" if past.universal else ""
                print(f"train: goes on from step {first} of {config.steps}{moved}", flush=True)
    if rank == 0:  # the others wait for it in the first step's sums
        checkpoints.discard(Path(p.storage), after=first)
    history = History(Path(p.history), first) if rank == 0 else None
    batches = _batches(store, stream, config, features, rank, world, first)

    window: list[StepMetrics] = []
    began, waited, anchors, noticed = time.perf_counter(), 0.0, 0.0, False
    for number in range(first, config.steps):
        asked = time.perf_counter()
        parts, lost = next(batches)
        waited += time.perf_counter() - asked
        counted["not_finite_samples"] += lost
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        if survival is not None:
            step.weigh_positions(survival.weights())
        metrics, apply = take_step(engine, step, parts, number, config.normalise, reduce, world)
        flags = torch.tensor([not math.isfinite(metrics.loss), listener.asked()], dtype=torch.float64, device=device)
        flags, survived, blocks = reduce(torch.cat((flags, metrics.survival, metrics.blocks[:1]))).tensor_split((2, -1))
        if (lost_loss := bool(flags[0])) or not apply():
            # Said by a file and not by raising: Ray Train would take the same step again, max_failures times.
            replay.keep(
                Path(p.history),
                step,
                parts,
                number,
                rank,
                world,
                learning_rate=learning_rate(number, config),
                loss=metrics.loss,
                what="loss is" if lost_loss else "gradients are",
                draft=_state(draft, gather),
            )
            return
        if average is not None:
            average.update()
        if survival is not None:
            survival.observe(survived, blocks)
        window.append(metrics)
        anchors += float(metrics.count[0])
        counted["skipped_samples"] += float(metrics.skipped)
        last, stop = number + 1 == config.steps, bool(flags[1])
        save = last or stop or (number + 1) % config.checkpoint_every == 0
        if not (save or (number + 1) % config.log_every == 0):
            continue
        # Ray's notice that a node will go away: a checkpoint now, and Ray Train moves the run when it does.
        notice = ray.train.get_preemption_info() is not None
        save, noticed = save or (notice and not noticed), notice
        summary = StepMetrics.total(window, reduce).summary()
        window = []
        spent = time.perf_counter() - began
        own = [anchors, waited, peak_memory(device), *counted.values()]
        totals = reduce(torch.tensor(own, dtype=torch.float64)).tolist()
        counts = dict(zip(counted, totals[3:], strict=True))
        summary |= {
            "step": number + 1,
            "lr": learning_rate(number, config),
            "anchors_per_second": totals[0] / spent,
            "starved_seconds": totals[1] / world,
            "memory_gib": totals[2] / world,
            "eta_seconds": spent / (number + 1 - first) * (config.steps - number - 1),
            **counts,
        }
        if survival is not None:
            summary |= {f"weight_{k}": w for k, w in enumerate(step.position_weights.tolist(), start=1)}
        if history is not None:
            history.add(summary)
        if save:
            state = survival.state() if survival else []
            folder = checkpoints.save(
                engine,
                average,
                run=run,
                step=number + 1,
                rank=rank,
                world=world,
                stage=stage,
                survival=state,
                counts=counts,
            )
            ray.train.report(
                summary,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=checkpoints.name_of(number + 1),
                delete_local_checkpoint_after_upload=True,
            )
            if last:
                _publish(p, draft, identity, config, summary)
            elif stop:
                if rank == 0:
                    write_json(stopped_file(Path(p.history)), {"step": number + 1})
                return
        else:
            ray.train.report(summary)
    if first >= config.steps:
        reported = History.read(Path(p.history)) if rank == 0 else []
        _publish(p, draft, identity, config, reported[-1] if reported else {})


def peak_memory(device: torch.device) -> float:
    """GiB that this rank has held at most: of the GPU, or of the process where it trains on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class History:
    """The metrics of a run, one JSON line per report, without the lines that a resumed run takes again."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        kept = [json.dumps(entry) + "\n" for entry in self.read(path) if entry["step"] <= first]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """The reports of a file, in order of steps; without one that a kill cut short, none without a file."""
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def add(self, summary: dict[str, float]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(summary) + "\n")
        acceptance = " ".join(f"{v:.2f}" for k, v in summary.items() if k.startswith("acceptance_"))
        print(
            f"train: step {summary['step']:.0f} loss {summary['loss']:.3f} acceptance {acceptance} "
            f"tau {summary['tau']:.2f} (greedy {summary['tau_greedy']:.2f}), "
            f"{summary['anchors_per_second']:.0f} anchors/s, "
            f"waited {summary['starved_seconds']:.1f} s for features, "
            f"{summary['eta_seconds']:.0f} s left",
            flush=True,
        )


def _batches(
    store: FeatureStore | None,
    stream: FeatureStream | None,
    config: TrainerConfig,
    features: FeaturesConfig,
    rank: int,
    world: int,
    first: int,
) -> Iterator[tuple[list[list[Row]], int]]:
    """This rank's microbatches of every step from `first` on, and how many rows had no finite features."""
    if stream is not None:
        return feed.streamed(
            stream.rows, stream.ask, stream.get, config, rank, world, first, request_rows=features.shard_rows
        )
    assert store is not None
    return _stored(store, config, rank, world, first)


def _stored(
    store: FeatureStore, config: TrainerConfig, rank: int, world: int, first: int
) -> Iterator[tuple[list[list[Row]], int]]:
    try:
        for parts in feed.stored(store, config, rank, world, first, expect=store.expect):
            yield parts, 0
    finally:
        store.close()  # a run that is told to stop doesn't wait for shards of steps to come


def _state(draft: Draft, gather: bool) -> Iterator[tuple[str, Tensor]]:
    """A draft's tensors by name, whole and with weights in fp32; every rank goes through them."""
    parameters = dict(draft.named_parameters())
    for name, tensor in draft.trainable_state().items():
        yield name, whole(parameters[name], gather) if name in parameters else tensor


def stopped_file(history: Path) -> Path:
    """Where a run that was asked to stop says at which step it did."""
    return history.with_name(f"{history.stem}-stopped.json")


def _publish(
    p: WorkerPlan, draft: Draft, identity: dict[str, str], config: TrainerConfig, summary: dict[str, float]
) -> None:
    """Writes the draft artifact from the last checkpoint's fp32 weights, or their running average (rank 0)."""
    import ray.train

    if ray.train.get_context().get_world_rank() != 0:
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    with checkpoint.as_directory() as folder:
        weights = checkpoints.weights(Path(folder))
    state = draft.trainable_state()
    missing = [name for name, _ in draft.named_parameters() if f"draft.{name}" not in weights]
    if missing:
        raise RuntimeError(f"the last checkpoint lacks {len(missing)} of the draft's weights, {missing[0]} first")
    for name in state:
        if f"draft.{name}" in weights and state[name].is_floating_point():
            state[name] = weights[f"draft.{name}"]
    save_draft(
        p.out,
        draft,
        target=identity,
        config=p.manifest_config,
        inputs=p.inputs,
        state=state,
        info={"training": {k: v for k, v in summary.items() if k != "eta_seconds"}, "steps": config.steps},
    )
