"""What a step is made of, as functions of (config, step) alone: a run may stop anywhere, and go on with another number
of workers, without a row or a learning rate changing."""

from __future__ import annotations

import math

import torch

from pipeline.config import TrainerConfig


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


def microbatches_of_step(step: int, rows: int, config: TrainerConfig, rank: int, world: int) -> list[list[int]]:
    """A rank's rows of a step, per microbatch. A microbatch is a consecutive piece of the step over all ranks, so what
    it holds does not depend on how many there are."""
    chosen = rows_of_step(step, rows, config.sequences_per_step, config.seed)
    share = config.sequences_per_step // (world * config.accumulate)
    return [chosen[start : start + share] for start in range(rank * share, len(chosen), world * share)]


_orders: dict[tuple[int, int, int], list[int]] = {}


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    key = (rows, seed, epoch)
    if key not in _orders:
        while len(_orders) > 1:  # a step may span two epochs
            _orders.pop(next(iter(_orders)))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(rows, generator=generator).tolist()
    return _orders[key]
