"""Small drafts trained in this process, for comparisons: no Ray, no DeepSpeed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.config import CorpusConfig, TrainerConfig
from pipeline.corpus.build import build_corpus
from pipeline.corpus.rows import TokenRow
from pipeline.drafts.base import Draft
from pipeline.features.forward import feature_rows
from pipeline.features.store import FeatureRow
from pipeline.target import Target
from pipeline.training.schedule import learning_rate, rows_of_step
from pipeline.training.step import TrainStep, Weights


def corpus_of(source: str, rows: int, target: Target, cache: Path, name: str) -> Path:
    """A corpus artifact of conversations, as the demo builds its own."""
    out = cache / name
    config = CorpusConfig(source=source, max_rows=rows, max_length=384, heldout_fraction=0.06)
    build_corpus(config, target.tokenizer, target.identity.as_dict(), out)
    return out


def features(target: Target, rows: list[TokenRow], layer_ids: list[int]) -> list[FeatureRow]:
    """Feature rows in memory, bf16."""
    return [r for r in feature_rows(target, rows, layer_ids, 1024) if r is not None]


def step_of(draft: Draft, config: TrainerConfig, target: Target) -> TrainStep:
    """The training step of a draft under a trainer's settings."""
    return TrainStep(
        draft,
        target.lm_head_weight.float(),
        Weights(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Weights)}),
        num_anchors=config.num_anchors,
        seed=config.seed,
        autocast=torch.bfloat16 if config.autocast else None,
    )


def fit(
    step: TrainStep, config: TrainerConfig, train: list[Any], *, steps: int = 0, seconds: float = 0.0
) -> tuple[int, float]:
    """Trains for so many steps, or as many as `seconds` hold (planned from the first eight).

    Returns:
        (steps taken, anchors per second).
    """
    optimizer = torch.optim.AdamW(
        step.draft.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    planned = steps or 10**6
    n, began, anchors = 0, time.perf_counter(), 0.0
    while n < planned and ((spent := time.perf_counter() - began) < seconds or steps):
        if n == 8 and not steps:
            planned = int(8 * seconds / spent)
        batch = [train[i] for i in rows_of_step(n, len(train), config.sequences_per_step, config.seed)]
        rate = learning_rate(n, dataclasses.replace(config, steps=planned))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, metrics = step(batch, n)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        anchors += float(metrics.count[0])
        n += 1
    return n, anchors / (time.perf_counter() - began)
