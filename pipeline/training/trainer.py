"""Sharded draft training on Ray Train (V2) with DeepSpeed.

train(config, features_dir=..., corpus_dir=..., out=...) returns the manifest of a draft artifact. The same call after
an interruption goes on from the last checkpoint; after success it returns what is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ray.train import UserCallback

from pipeline import artifact
from pipeline.config import PipelineConfig, to_plain
from pipeline.drafts.config import tapping
from pipeline.errors import ConfigError, DraftlineError, user_error
from pipeline.features import extract
from pipeline.features.store import check_identity
from pipeline.target.loading import load_identity
from pipeline.training import replay
from pipeline.training.engine import check_settings
from pipeline.training.preemption import HeedSigterm, bell
from pipeline.training.worker import History, WorkerPlan, stopped_file, train_worker

POLL_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""Ray Train's own environment variable: seconds between its controller's polls of the workers."""


class Sink(Protocol):
    """Takes metrics of a step (`pipeline.registry.recorder.StageRun`); travels to the controller pickled."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...


def stage_config(config: PipelineConfig) -> dict[str, Any]:
    """The settings that decide what training produces (where and on how many workers it runs, and how often it reports,
    do not; nor do what bounds memory, and microbatches unless they weigh something)."""
    target: dict[str, Any] = {"dtype": config.target.dtype}  # what the borrowed matrices are in
    where = {"checkpoint_every", "log_every", "max_failures", "threads_per_worker", "use_gpu", "workers", "chunk_rows"}
    trainer = {k: v for k, v in to_plain(config.trainer).items() if k not in where}
    if config.trainer.normalise == "tokens":
        trainer.pop("accumulate")
    plain = {"trainer": trainer, "draft": to_plain(config.draft), "deepspeed": config.deepspeed, "target": target}
    if config.features.mode == "stream":
        plain["features"] = extract.stage_config(config.features, config.target, "train")
        plain["features"].pop("shard_rows")
    return plain


def train(
    config: PipelineConfig,
    *,
    features_dir: Path | None,
    corpus_dir: Path,
    out: Path,
    run_dir: Path,
    cache_dir: Path,
    former_dir: Path | None = None,
    begin: Callable[[], Sink | None] = lambda: None,
) -> artifact.Manifest:
    """Trains a draft; Ray must be initialised.

    Args:
        former_dir: a draft artifact to start from, which every worker can read.
        features_dir: a features artifact; None streams features from extraction (features.mode=stream).
        out: the draft artifact. run_dir: checkpoints and `train/history-<key>.jsonl`.
        begin: called when there is training to do; what it returns gets the metrics of every report, with their step,
            as they come (in Ray Train's controller, a process of this node).
    Raises:
        DraftlineError: training failed, or was asked to stop by SIGTERM (the same call goes on).
        ConfigError: a DeepSpeed config that can't be used.
        ArtifactError: features made with another target.
    """
    import ray

    check_settings(config.deepspeed)
    former = artifact.load(former_dir, "draft", verify=False).digest if former_dir is not None else None
    config, inputs, identity = _made_from(config, features_dir, corpus_dir, cache_dir, former)
    plain = stage_config(config)
    if (done := artifact.current(out, "draft", config=plain, inputs=inputs, target=identity)) is not None:
        return done
    sink = begin()
    key = artifact.digest_json([plain, inputs, identity])[:12]
    storage = Path(run_dir) / "train"
    plan = WorkerPlan(
        target=to_plain(config.target),
        draft=to_plain(config.draft),
        trainer=to_plain(config.trainer),
        features=to_plain(config.features),
        deepspeed=config.deepspeed,
        cache_dir=str(cache_dir),
        corpus_dir=str(corpus_dir),
        features_dir=str(features_dir) if features_dir is not None else "",
        former_dir=str(former_dir.absolute()) if former_dir is not None else "",
        out=str(out),
        history=str(storage / f"history-{key}.jsonl"),
        storage=str(storage / f"draft-{key}"),
        manifest_config=plain,
        inputs=inputs,
    )
    stopped = stopped_file(Path(plan.history))
    stopped.unlink(missing_ok=True)
    replay.begin(Path(plan.history))
    stream = None
    if features_dir is None:
        from pipeline.features.stream import feature_stream

        stream = feature_stream(config.features, config.target, corpus_dir, cache_dir)
    try:
        with bell() as handle:
            _fit(config, {**dataclasses.asdict(plan), "bell": handle, "stream": stream}, f"draft-{key}", storage, sink)
    finally:
        for actor in stream.actors if stream else ():
            ray.kill(actor)
    if (bad := replay.left(Path(plan.history))) is not None:
        step, what, files = bad
        raise DraftlineError(
            f"The training {what} not finite at step {step}. The samples of that step are in {storage} "
            f"({', '.join(f.name for f in files)}; pipeline/training/replay.py reads them). Lower trainer.lr (now "
            f"{config.trainer.lr}) or look for bad features."
        )
    if stopped.is_file():
        raise DraftlineError(
            f"Training was asked to stop (SIGTERM) and saved step {json.loads(stopped.read_text())['step']} of "
            f"{config.trainer.steps}. The same command goes on from there."
        )
    return artifact.load(out, "draft", verify=False)


def is_trained(
    config: PipelineConfig,
    *,
    features_dir: Path | None,
    corpus_dir: Path,
    out: Path,
    cache_dir: Path,
    former: str | None,
) -> bool:
    """Whether `train` would have nothing to do, were it to start from the draft with the digest `former`."""
    made, inputs, identity = _made_from(config, features_dir, corpus_dir, cache_dir, former)
    return artifact.current(out, "draft", config=stage_config(made), inputs=inputs, target=identity) is not None


def _made_from(
    config: PipelineConfig, features_dir: Path | None, corpus_dir: Path, cache_dir: Path, former: str | None
) -> tuple[PipelineConfig, dict[str, str], dict[str, str]]:
    """All that decides about a draft: the configuration with its layers, the digests of what it is made from, and the
    target's identity.

    Raises:
        ConfigError: a target that training can't use, layers that the features are not of.
        ArtifactError: features made with another target.
    """
    inputs = {"corpus": artifact.load(corpus_dir, "corpus", verify=False).digest}
    identity = load_identity(config.target, cache_dir).as_dict()
    if features_dir is not None:
        features = artifact.load(features_dir, "features", verify=False)
        check_identity(features, identity, features_dir)  # here too: a worker's refusal is tried max_failures times
        inputs["features"] = features.digest
    if former is not None:
        inputs["former"] = former
    if config.target.dtype == "float16":
        raise ConfigError(
            "target.dtype=float16: gradients of the vocabulary loss would be lost in its range. Train with "
            "target.dtype=bfloat16 (or float32)."
        )
    return _with_layers(config, features_dir, cache_dir), inputs, identity


def _with_layers(config: PipelineConfig, features_dir: Path | None, cache_dir: Path) -> PipelineConfig:
    """The configuration with the layers that its features come from, which are the ones the draft will tap.

    Raises:
        ConfigError: the draft wants others.
    """
    if features_dir is None:
        features = extract.with_layers(config.features, config.target, cache_dir)
        given, where = list(features.target_layer_ids), "features.target_layer_ids"
    else:
        manifest = artifact.load(features_dir, "features", verify=False)
        features = config.features
        given, where = list(manifest.info["target_layer_ids"]), f"the features at {features_dir}"
    return dataclasses.replace(config, features=features, draft=tapping(config.draft, given, where))


def _fit(config: PipelineConfig, plan: dict[str, Any], name: str, storage: Path, sink: Sink | None) -> None:
    """Runs the workers until they end.

    Raises:
        DraftlineError: they failed more than trainer.max_failures times.
    """
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        train_worker,
        train_loop_config=plan,
        torch_config=TorchConfig(backend="nccl" if config.trainer.use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.trainer.workers, use_gpu=config.trainer.use_gpu),
        run_config=RunConfig(  # type: ignore[call-arg]  # V2's; the checker sees V1's
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            # Workers print their own progress; Ray Train's patched print would show every line twice.
            callbacks=[HeedSigterm(), *([_Reports(sink)] if sink else [])],  # type: ignore[list-item]  # V2's
            # One arena: with glibc's own number of them a CPU worker of the demo trained a tenth slower.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "MALLOC_ARENA_MAX": "1"}},
        ),
    )
    try:
        with _polled(config.trainer.workers):
            trainer.fit()
    except ray.train.TrainingFailedError as e:
        failures = getattr(e, "worker_failures", {}).values()
        if (cause := user_error(str(e), *map(str, failures))) is None:
            raise
        raise DraftlineError(f"Training failed: {cause}") from None


@contextlib.contextmanager
def _polled(workers: int) -> Iterator[None]:
    """Ray Train's controller, started in the block, polls its workers five times a second (a hundred workers once), or
    as POLL_INTERVAL in the environment says.

    It takes one report of a worker per poll, and the worker's next one waits until then: at Ray's own 2 s, training
    that takes less than that for `log_every` steps would wait for its reports.
    """
    if POLL_INTERVAL in os.environ:
        yield
        return
    os.environ[POLL_INTERVAL] = str(max(0.2, workers / 100))
    try:
        yield
    finally:
        del os.environ[POLL_INTERVAL]


def history(run_dir: Path, manifest: artifact.Manifest) -> list[dict[str, float]]:
    """The reported metrics of the run that made a draft, in order of steps."""
    key = artifact.digest_json([manifest.config, manifest.inputs, manifest.target])[:12]
    return History.read(Path(run_dir) / "train" / f"history-{key}.jsonl")


class _Reports(UserCallback):
    """Passes rank 0's reports on. A tracking server that is away for a moment costs its points, not the training."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            self._sink.log_metrics(metrics[0], int(metrics[0]["step"]))
        except Exception as e:
            print(f"train: the metrics of step {metrics[0]['step']} could not be recorded: {e}", flush=True)
