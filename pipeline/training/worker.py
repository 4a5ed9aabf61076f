"""What runs on every training worker: DeepSpeed around TrainStep, checkpoints, resume.

Everything a step depends on (rows, anchors, learning rate) is a function of (config, step), so a resumed run takes
exactly the steps an uninterrupted one would have taken.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifact import write_json
from pipeline.config import FeaturesConfig, TargetConfig, TrainerConfig, from_plain
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import save_draft
from pipeline.drafts.config import DraftConfig
from pipeline.features.store import FeatureStore, check_identity
from pipeline.target import load_target
from pipeline.training.start import build_draft
from pipeline.training.step import StepMetrics, TrainStep, Weights

TAG = "deepspeed"


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
    out: str
    history: str
    manifest_config: dict[str, Any]
    inputs: dict[str, str]


class Objective(nn.Module):
    """The draft with its loss, as the one module that DeepSpeed wraps."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.draft = step.draft
        self._step = [step]

    def forward(self, rows: list[Any], number: int, reduce: Any, world_size: int) -> tuple[Tensor, StepMetrics]:
        return self._step[0](rows, number, reduce=reduce, world_size=world_size)


def learning_rate(step: int, config: TrainerConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def rows_of_step(step: int, rows: int, per_step: int, seed: int) -> list[int]:
    """Indices of the rows of a step: consecutive pieces of one permutation per epoch."""
    out = []
    for i in range(step * per_step, (step + 1) * per_step):
        epoch, at = divmod(i, rows)
        out.append(_permutation(rows, seed, epoch)[at])
    return out


_orders: dict[tuple[int, int, int], list[int]] = {}


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    key = (rows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(rows, generator=generator).tolist()
    return _orders[key]


def train_worker(plan: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray.train
    import torch.distributed as dist

    # Its INFO repeats every report in Python's own notation; history.jsonl and the progress lines hold the same.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    p = WorkerPlan(**plan)
    config = from_plain(TrainerConfig, p.trainer, "trainer")
    torch.set_num_threads(config.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    target = load_target(from_plain(TargetConfig, p.target, "target"), Path(p.cache_dir))
    identity = target.identity.as_dict()
    store = None
    if from_plain(FeaturesConfig, p.features, "features").mode == "store":
        store = FeatureStore(p.features_dir)
        check_identity(store.manifest, identity, p.features_dir)
    draft = build_draft(from_plain(DraftConfig, p.draft, "draft"), config, target, Path(p.corpus_dir), store or ())
    step = TrainStep(
        draft,
        target.lm_head_weight,
        Weights(config.ce, config.kl, config.tv, config.confidence, config.decay),
        num_anchors=config.num_anchors,
        seed=config.seed,
        autocast=getattr(torch, config.autocast) if config.autocast else None,
        chunk=config.chunk_rows,
    )
    del target

    import deepspeed

    objective = Objective(step)
    optimizer = torch.optim.AdamW(
        [q for q in objective.parameters() if q.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
        weight_decay=config.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=objective,
        model_parameters=[q for q in objective.parameters() if q.requires_grad],
        optimizer=optimizer,
        config={
            **p.deepspeed,
            "train_micro_batch_size_per_gpu": config.sequences_per_step // world,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, tag=TAG)
            first = int(state["step"])
        if rank == 0:
            print(f"train: goes on from step {first} of {config.steps}", flush=True)
    history = History(Path(p.history), first) if rank == 0 else None
    rows = _feed(store, config, rank, world, first)

    def reduce(t: Tensor) -> Tensor:
        dist.all_reduce(t)
        return t

    window: list[StepMetrics] = []
    began, waited, anchors = time.perf_counter(), 0.0, 0.0
    for number in range(first, config.steps):
        asked = time.perf_counter()
        batch = next(rows)
        waited += time.perf_counter() - asked
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        loss, metrics = engine(batch, number, reduce, world)
        if _not_finite(loss, reduce):
            # Said by a file and not by raising: Ray Train would take the same step again, max_failures times.
            _keep_for_replay(Path(p.history), number, rank, batch)
            return
        engine.backward(loss)
        engine.step()
        window.append(metrics)
        anchors += float(metrics.count[0])
        last = number + 1 == config.steps
        save = last or (number + 1) % config.checkpoint_every == 0
        if not (save or (number + 1) % config.log_every == 0):
            continue
        summary = StepMetrics.total(window, reduce).summary()
        window = []
        spent = time.perf_counter() - began
        summary |= {
            "step": number + 1,
            "lr": learning_rate(number, config),
            "anchors_per_second": float(reduce(torch.tensor(anchors))) / spent,
            "starved_seconds": waited,
            "eta_seconds": spent / (number + 1 - first) * (config.steps - number - 1),
        }
        if history is not None:
            history.add(summary)
        if save:
            folder = tempfile.mkdtemp(prefix="draft-checkpoint-")
            engine.save_checkpoint(folder, tag=TAG, client_state={"step": number + 1})
            ray.train.report(
                summary,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step_{number + 1:06d}",
                delete_local_checkpoint_after_upload=True,
            )
            if last:
                _publish(p, draft, identity, config, summary)
        else:
            ray.train.report(summary)
    if first >= config.steps:
        _publish(p, draft, identity, config, {})


class History:
    """The metrics of a run, one JSON line per report, without the lines that a resumed run takes again."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= first]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []

    def add(self, summary: dict[str, float]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(summary) + "\n")
        acceptance = " ".join(f"{v:.2f}" for k, v in summary.items() if k.startswith("acceptance_"))
        print(
            f"train: step {summary['step']:.0f} loss {summary['loss']:.3f} acceptance {acceptance} "
            f"tau {summary['tau']:.2f} (greedy {summary['tau_greedy']:.2f}), "
            f"{summary['anchors_per_second']:.0f} anchors/s, "
            f"{summary['eta_seconds']:.0f} s left",
            flush=True,
        )


def _feed(store: FeatureStore | None, config: TrainerConfig, rank: int, world: int, first: int) -> Iterator[list[Any]]:
    """This rank's rows, step by step, from `first` on; without a store, as they are streamed."""
    share = config.sequences_per_step // world
    if store is not None:
        for number in range(first, config.steps):
            chosen = rows_of_step(number, len(store), config.sequences_per_step, config.seed)
            yield [store[i] for i in chosen[rank * share : (rank + 1) * share]]
        return
    import ray.train

    from pipeline.features.stream import to_feature_row

    shard = ray.train.get_dataset_shard("train")
    batch: list[Any] = []
    while True:
        for row in shard.iter_rows():
            batch.append(to_feature_row(row))
            if len(batch) == share:
                yield batch
                batch = []


def _not_finite(loss: Tensor, reduce: Any) -> bool:
    """Whether the loss of any rank is NaN or infinite."""
    return float(reduce(torch.tensor(float(not math.isfinite(float(loss.detach())))))) > 0


def replay_files(history: Path) -> list[Path]:
    """The batches of a step whose loss was not finite, one file per rank."""
    return sorted(history.parent.glob(f"{history.stem}-not-finite-*.json"))


def _keep_for_replay(history: Path, number: int, rank: int, batch: list[Any]) -> None:
    file = history.with_name(f"{history.stem}-not-finite-step-{number}-rank-{rank}.json")
    write_json(file, {"step": number, "rank": rank, "sample_ids": [r.sample_id for r in batch]})


def _publish(
    p: WorkerPlan, draft: Draft, identity: dict[str, str], config: TrainerConfig, summary: dict[str, float]
) -> None:
    """Writes the draft artifact from the last checkpoint's fp32 weights (rank 0)."""
    import ray.train
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if ray.train.get_context().get_world_rank() != 0:
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    with checkpoint.as_directory() as folder:
        weights = get_fp32_state_dict_from_zero_checkpoint(folder, tag=TAG)
    state = draft.trainable_state()
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
