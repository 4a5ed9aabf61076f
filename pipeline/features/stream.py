"""Features straight from extraction to training, with nothing on disk.

bfloat16 travels as its bits in int16, because Ray Data knows no bfloat16.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.config import FeaturesConfig, TargetConfig
from pipeline.corpus.build import Split, read_rows
from pipeline.features.extract import check, num_gpus
from pipeline.features.forward import feature_rows
from pipeline.features.store import FeatureRow
from pipeline.target import load_target

if TYPE_CHECKING:
    import ray.data


class StreamExtractor:
    """Maps {"row": int64[n]} (indices of training rows) to flat feature columns."""

    def __init__(self, config: FeaturesConfig, target: TargetConfig, corpus: str, split: Split, cache: str) -> None:
        self.config = config
        self.target_config = dataclasses.replace(target, dtype=config.compute_dtype or target.dtype)
        self.rows = read_rows(corpus, split)
        self.cache = Path(cache)
        self.target: Any = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        torch.set_num_threads(self.config.threads)
        if self.target is None:
            self.target = load_target(self.target_config, self.cache)
        rows = [self.rows[int(i)] for i in batch["row"]]
        made = feature_rows(self.target, rows, self.config.target_layer_ids, self.config.batch_tokens)
        good = [r for r in made if r is not None]
        return {
            "sample_id": [r.sample_id for r in good],
            "input_ids": [r.input_ids.numpy().astype(np.int32) for r in good],
            "loss_mask": [r.loss_mask.numpy() for r in good],
            "taps": [r.taps.view(torch.int16).numpy().reshape(-1) for r in good],
            "last_hidden": [r.last_hidden.view(torch.int16).numpy().reshape(-1) for r in good],
        }


def feature_stream(
    config: FeaturesConfig,
    target: TargetConfig,
    corpus_dir: Path | str,
    cache_dir: Path | str,
    split: Split = "train",
) -> ray.data.Dataset:
    """The rows that `extract` would keep, as a lazy dataset of feature columns (see `to_feature_row`).

    Every pass over it runs the target again. Ray must be initialised.

    Raises:
        ConfigError, ArtifactError, DraftlineError: as `extract`, before anything runs.
    """
    import ray.data

    count, _ = check(config, target, corpus_dir, cache_dir, split)
    return (
        ray.data.range(count, override_num_blocks=max(1, count // config.shard_rows))
        .rename_columns({"id": "row"})
        .map_batches(
            StreamExtractor,
            batch_size=config.shard_rows,
            num_cpus=1,
            num_gpus=num_gpus(target),
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            fn_constructor_args=(
                config,
                target,
                str(Path(corpus_dir).absolute()),
                split,
                str(Path(cache_dir).absolute()),
            ),
        )
    )


def to_feature_row(row: dict[str, Any]) -> FeatureRow:
    """The FeatureRow of one row of the stream."""
    ids = torch.from_numpy(np.array(row["input_ids"], dtype=np.int64))
    bits = {k: torch.from_numpy(np.array(row[k], dtype=np.int16)).view(torch.bfloat16) for k in ("taps", "last_hidden")}
    return FeatureRow(
        str(row["sample_id"]),
        ids,
        torch.from_numpy(np.array(row["loss_mask"], dtype=bool)),
        bits["taps"].view(len(ids), -1),
        bits["last_hidden"].view(len(ids), -1),
    )
