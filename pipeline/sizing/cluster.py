"""Whether an experiment fits the cluster of its config, and what must be known even if it does.

What runs at once is counted as Ray counts it: logical CPUs and whole GPUs of the actors and workers of a stage, and
beside every stage the job's own process.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pipeline.config import PipelineConfig
from pipeline.drafts.formats import engines
from pipeline.target.families import ENGINE_OBSTACLES

if TYPE_CHECKING:
    from pipeline.sizing.plan import Plan

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a stage holds while it runs. cpus: logical ones. who: its processes in words."""

    stage: str
    gpus: int
    cpus: int
    who: str


def demands(config: PipelineConfig, decodes: bool) -> list[Demand]:
    """Of every stage that asks Ray for resources.

    Args:
        decodes: the engine decodes the target; where it does not, nothing is regenerated or served.
    """
    trainer, features, ask = config.trainer, config.features, config.corpus.regenerate
    on_gpu = config.target.device != "cpu"

    def group(stage: str, noun: str, count: int, gpus: int, cpus: int = 1) -> Demand:
        each = f" of {gpus} GPU{'s' * (gpus > 1)}" if gpus else ""
        return Demand(stage, count * gpus, count * cpus, f"{count} {noun}{'s' * (count > 1)}{each}")

    extract = group("extract", "extracting actor", features.actors, features.gpus_per_actor * on_gpu)
    # A worker on a GPU asks for no CPU (Ray Train's default).
    train = group("train", "worker", trainer.workers, int(trainer.use_gpu), int(not trainer.use_gpu))
    if features.mode == "stream":
        both = f"{train.who}, {extract.who}"
        found = [Demand("train", train.gpus + extract.gpus, train.cpus + extract.cpus, both)]
    else:
        found = [extract, train]
    if decodes:
        found.append(group("regenerate", "answering actor", ask.actors, int(on_gpu)))
        found.append(group("serve", "replica", 1, int(on_gpu)))
    return found


def obstacles(plan: Plan) -> list[str]:
    """Why the experiment would not fit the cluster of its config; empty if it does."""
    found = [*_memory(plan), *_counts(plan.config, _decodes(plan)), *_room(plan)]
    if not _decodes(plan) and not any(f.loads for f in _fits(plan)):
        kind = plan.target.config.model_type
        found.append(
            f"Nothing would run this draft: draftline's engine does not decode {kind} targets, and of the engines that "
            f"drafts are exported to, {' '.join(map(str, _fits(plan)))}"
        )
    return found


def notes(plan: Plan) -> list[str]:
    """What is not an obstacle but must be known."""
    config = plan.config
    borrowed = (1 if plan.target.tied else 2) * plan.target.vocabulary * plan.target.hidden * plan.target_item
    found = [
        f"every training worker reads the target's embedding and lm_head into the host's memory as it starts: "
        f"{bytes_text(borrowed)} each, of {config.trainer.workers} workers"
    ]
    start = config.trainer.warm_start.layers
    if start == "target" or (start == "auto" and (config.features.mode == "stream" or config.draft.qk_norm)):
        whole = plan.target.parameters * plan.target_item
        found.append(f"one of them reads the whole target, {bytes_text(whole)}, where it copies its last layers")
    if _driver_gpus(config, _decodes(plan)):
        found.append(
            "calibrate, parity, evaluate and promote decode in the job's own process: submit the pipeline, or them, "
            "with --entrypoint-num-gpus 1 (docs/jobs.md)"
        )
    uses_gpus = any(d.gpus for d in demands(config, _decodes(plan)))
    if uses_gpus and not config.cluster.gpu_memory_gib:
        found.append("not checked: what a GPU must hold (cluster.gpu_memory_gib is not given)")
    if config.features.mode == "store" and not config.cluster.storage_gib:
        found.append("not checked: room for the stored features (cluster.storage_gib is not given)")
    if not _decodes(plan):
        kind = plan.target.config.model_type
        found.append(
            f"draftline's engine does not decode {kind} targets ({ENGINE_OBSTACLES[kind]}): train the draft, export it "
            "(export.version=trained) and measure it in vLLM or SGLang."
        )
    return found + [str(f) for f in _fits(plan)]


def bytes_text(n: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1024:,.1f} KiB"


def _fits(plan: Plan) -> list[engines.Fit]:
    """Whether the engines that drafts are exported to would load this one."""
    return [engines.best(plan.draft, name) for name in engines.OWN]


def _decodes(plan: Plan) -> bool:
    return plan.target.config.model_type not in ENGINE_OBSTACLES


def _driver_gpus(config: PipelineConfig, decodes: bool) -> int:
    """Of the pipeline's own process (`--entrypoint-num-gpus`), which holds it from its first stage to its last."""
    return int(decodes and config.target.device != "cpu")


def _memory(plan: Plan) -> list[str]:
    found: list[str] = []
    config = plan.config
    if not config.cluster.gpu_memory_gib:
        return found
    room = config.cluster.gpu_memory_gib * GIB
    per_actor = room * config.features.gpus_per_actor
    if config.target.device != "cpu" and plan.extractor_bytes > per_actor:
        found.append(
            f"An extracting actor needs {plan.extractor_bytes / GIB:.0f} GiB; "
            f"{config.features.gpus_per_actor} GPUs have {per_actor / GIB:.0f}. Raise "
            "features.gpus_per_actor (with target.device=auto), or take larger GPUs."
        )
    if config.trainer.use_gpu and (need := plan.memory(plan.stage).total) > room:
        fits = [s for s in (1, 2, 3) if plan.memory(s).total <= room]
        remedy = f"deepspeed=zero{fits[0]}" if fits else "fewer trainer.num_anchors, more trainer.accumulate"
        found.append(
            f"A training rank needs {need / GIB:.0f} GiB under ZeRO-{plan.stage}; a GPU has "
            f"{room / GIB:.0f}. Use {remedy}."
        )
    return found


def _counts(config: PipelineConfig, decodes: bool) -> list[str]:
    found, cluster, driver = [], config.cluster, _driver_gpus(config, decodes)
    most = max(demands(config, decodes), key=lambda d: d.gpus)
    if most.gpus + driver > cluster.gpus:
        beside = " and 1 for the pipeline's own process, which decodes" if driver else ""
        said = f"{most.gpus + driver} GPUs are needed at once ({most.stage}: {most.who}{beside}); cluster.gpus="
        if not cluster.gpus:
            found.append(
                f"{said}0. Name the cluster that it is for (cluster=h100x8, or cluster.gpus=8), or stay on CPUs "
                "(trainer=cpu target.device=cpu)."
            )
        else:
            alone = f", or submit the stages one by one: then {most.gpus} do" if most.gpus <= cluster.gpus else ""
            found.append(f"{said}{cluster.gpus}. Use fewer trainer.workers or features.actors{alone}.")
    widest = max(demands(config, decodes), key=lambda d: d.cpus)
    if widest.cpus > cluster.num_cpus:
        found.append(
            f"{widest.cpus} logical CPUs are needed at once ({widest.stage}: {widest.who}); cluster.num_cpus="
            f"{cluster.num_cpus}. Use fewer trainer.workers, features.actors or corpus.regenerate.actors, or raise "
            "cluster.num_cpus if the cluster has them."
        )
    return found


def _room(plan: Plan) -> list[str]:
    found, config, cluster = [], plan.config, plan.config.cluster
    if config.features.mode == "store" and 0 < cluster.storage_gib * GIB < plan.store_bytes:
        found.append(
            f"Stored features take {plan.store_bytes / GIB:,.0f} GiB; cluster.storage_gib={cluster.storage_gib}. "
            "Use features=stream, which keeps nothing on disk."
        )
    if config.features.mode == "stream" and plan.stream_bytes > cluster.object_store_gib * GIB:
        found.append(
            f"Streamed features take up to {plan.stream_bytes / GIB:.0f} GiB of the object store; "
            f"cluster.object_store_gib={cluster.object_store_gib:g}. Use a smaller features.shard_rows."
        )
    return found
