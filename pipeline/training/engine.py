"""One optimizer step: DeepSpeed around TrainStep, microbatches under it. No Ray."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import TrainerConfig
from pipeline.config_values import zero_stage
from pipeline.errors import ConfigError, nearest
from pipeline.training.step import Row, StepMetrics, TrainStep

# DeepSpeed takes any key and asks for these (0.19; a test reads them off it). Those that it reads and refuses are left
# out, and `bfloat16`, an older name of `bf16` that nobody but DeepSpeed would look at.
_DEEPSPEED = """
activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc
dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print
tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""

Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor over ranks."""


def check_settings(deepspeed_config: dict[str, Any]) -> None:
    """Raises ConfigError for a key that DeepSpeed would pass over in silence, and for a ZeRO stage or a precision that
    training has no use for."""
    known = _DEEPSPEED.split()
    for name in deepspeed_config:
        if name not in known:
            raise ConfigError(
                f"deepspeed.{name} is not a setting of DeepSpeed's.{nearest(str(name), known)} Valid here: "
                f"{', '.join(known)}."
            )
    if (deepspeed_config.get("fp16") or {}).get("enabled"):
        raise ConfigError(
            "deepspeed.fp16.enabled=true: a draft's gradients leave float16's range, and a step that DeepSpeed skips "
            "for that would be taken for lost. Use deepspeed=zero2_bf16, or trainer.autocast=bfloat16."
        )
    zero_stage(deepspeed_config)


class Objective(nn.Module):
    """The draft with its loss, as the one module that DeepSpeed wraps."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.draft = step.draft
        self._step = [step]

    def forward(self, rows: list[Row], number: int, denominators: Tensor, scale: float) -> tuple[Tensor, StepMetrics]:
        return self._step[0](rows, number, denominators, scale)


def make_engine(
    objective: Objective, deepspeed_config: dict[str, Any], config: TrainerConfig, world: int, universal: bool
) -> tuple[Any, torch.optim.Optimizer]:
    """The DeepSpeed engine of an objective and the optimizer whose learning rate the loop sets."""
    import deepspeed

    build_with_own_ninja()
    wait_for_operator()
    trainable = [q for q in objective.parameters() if q.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
        weight_decay=config.weight_decay,
    )
    draft = objective.draft
    half = bool((deepspeed_config.get("bf16") or {}).get("enabled"))
    exact = {name: getattr(draft, name) for name in ("inv_freq", "temperatures")}
    started = [q.detach().clone() for q in trainable] if half else []
    settings = {
        **deepspeed_config,
        "train_micro_batch_size_per_gpu": config.sequences_per_step // (world * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.grad_clip,
        "zero_allow_untested_optimizer": True,
        # Offload takes this AdamW to the CPU, instead of DeepSpeed's own that is compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if universal:
        settings["checkpoint"] = {**(deepspeed_config.get("checkpoint") or {}), "load_universal": True}
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=trainable, optimizer=optimizer, config=settings, dist_init_required=False
    )
    # bf16 takes the whole module down. Angles of positions don't survive it, and DeepSpeed makes its fp32 weights of
    # what it left.
    for name, value in exact.items():
        setattr(draft, name, value)
    if half:
        for parameter, weight in zip(trainable, started, strict=True):
            _set_master(parameter, weight)
    return engine, optimizer


def build_with_own_ninja() -> None:
    """Puts this interpreter's programs first on the PATH, ninja above all, and what torch builds into its environment.

    Versions of ninja disagree on whether DeepSpeed's CPU operator is up to date: a system's and an environment's, as
    the PATHs of a user's shell and of a Ray job find them, would build it again in turn, a minute each. So would two
    environments of one user in the one folder that torch has for all.
    """
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join(filter(None, (own, path)))


def wait_for_operator(root: Path | None = None, abandoned_after: float = 300.0) -> None:
    """Waits while another process builds DeepSpeed's CPU operator, and takes away the lock of one that was killed.

    torch itself would wait for ever, and without a word: its lock is a file that nobody owns.

    Args:
        root: torch's folder of extensions. abandoned_after: seconds; a build takes about one minute.
    """
    from torch.utils.cpp_extension import get_default_build_root

    told = False
    folder = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    while locks := [f for f in (*folder.glob("deepspeed_*/lock"), *folder.glob("*/deepspeed_*/lock")) if f.exists()]:
        try:
            age = time.time() - locks[0].stat().st_mtime
        except FileNotFoundError:
            continue
        if age > abandoned_after:
            print(f"train: {locks[0]} is {age:.0f} s old, of a build that was killed: removed", flush=True)
            locks[0].unlink(missing_ok=True)
            continue
        if not told:
            print(f"train: waits for another process that builds DeepSpeed's operator ({locks[0]})", flush=True)
        told = True
        time.sleep(0.2)


def _set_master(parameter: nn.Parameter, weight: Tensor) -> None:
    """Gives DeepSpeed's fp32 weight of a parameter another value; every rank calls it."""
    import torch.distributed as dist
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3's
    if shard is None:
        safe_set_full_fp32_param(parameter, weight)
        return
    # DeepSpeed 0.19 cuts a whole weight without padding it, and fails where ranks don't divide its size.
    size, rank = shard.numel(), dist.get_rank()
    padded = F.pad(weight.flatten(), (0, size * dist.get_world_size() - weight.numel()))
    safe_set_local_fp32_param(parameter, padded[rank * size : (rank + 1) * size])


def weigh(step: TrainStep, parts: list[list[Row]], number: int, normalise: str, reduce: Reduce) -> Tensor:
    """Denominators float64[microbatches, 2] of a step, over all ranks.

    With `tokens` every microbatch is divided by the sums of the whole step, so that their losses add up to the mean
    over its tokens. With `microbatches` each is divided by its own and by how many there are: the mean of their means.
    """
    sums = reduce(torch.stack([step.denominators(rows, number) for rows in parts]))
    return sums.sum(0).expand_as(sums) if normalise == "tokens" else sums * len(parts)


def take_step(
    engine: Any, step: TrainStep, parts: list[list[Row]], number: int, normalise: str, reduce: Reduce, world: int
) -> tuple[StepMetrics, Callable[[], bool]]:
    """Forward and backward of a step's microbatches: this rank's share of the metrics, and what takes the optimizer
    step, so that a loss which is not finite never reaches the weights; it returns, on every rank alike, whether the
    gradients were finite too. Of those that are not DeepSpeed takes no step, and goes on."""
    denominators = weigh(step, parts, number, normalise, reduce)
    total: StepMetrics | None = None
    for i, rows in enumerate(parts):
        # DeepSpeed takes the mean over ranks and microbatches; the denominators hold both already.
        loss, metrics = engine(rows, number, denominators[i], float(world * len(parts)))
        engine.backward(loss)
        total = metrics if total is None else total + metrics
        if i + 1 < len(parts):
            engine.step()
    assert total is not None

    def apply() -> bool:
        engine.step()
        return bool(engine.was_step_applied())

    return total, apply
