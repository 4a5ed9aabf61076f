"""Features straight from extraction to training, with nothing on disk.

bfloat16 travels as its bits in int16, because Ray Data knows no bfloat16.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import FeaturesConfig, TargetConfig
from pipeline.corpus.build import read_rows
from pipeline.features.forward import features_of
from pipeline.features.store import FeatureRow
from pipeline.target import load_target


class StreamExtractor:
    """Maps {"row": int64[n]} (indices of training rows) to flat feature columns."""

    def __init__(self, config: FeaturesConfig, target: TargetConfig, corpus: str, cache: str) -> None:
        self.config = config
        self.target_config = dataclasses.replace(target, dtype=config.compute_dtype or target.dtype)
        self.rows = read_rows(corpus, "train")
        self.cache = Path(cache)
        self.target: Any = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        torch.set_num_threads(self.config.threads)
        if self.target is None:
            self.target = load_target(self.target_config, self.cache)
        rows = [self.rows[int(i)] for i in batch["row"]]
        made = features_of(self.target, rows, self.config.target_layer_ids, self.config.batch_tokens)
        good = [r for r in made if r is not None]
        return {
            "sample_id": [r.sample_id for r in good],
            "input_ids": [r.input_ids.numpy().astype(np.int32) for r in good],
            "loss_mask": [r.loss_mask.numpy() for r in good],
            "taps": [r.taps.view(torch.int16).numpy().reshape(-1) for r in good],
            "last_hidden": [r.last_hidden.view(torch.int16).numpy().reshape(-1) for r in good],
        }


def feature_stream(config: FeaturesConfig, target: TargetConfig, corpus_dir: Path, cache_dir: Path) -> Any:
    """A ray.data.Dataset of feature columns over the corpus' training rows (see `to_feature_row`)."""
    import ray

    count = len(read_rows(corpus_dir, "train"))
    return ray.data.range(count, override_num_blocks=max(1, count // config.shard_rows)).rename_columns(
        {"id": "row"}
    ).map_batches(
        StreamExtractor,
        batch_size=config.shard_rows,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=config.actors),
        fn_constructor_args=(config, target, str(corpus_dir), str(cache_dir)),
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
