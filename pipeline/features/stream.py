"""Features straight from extraction to training, with nothing on disk.

Actors hold the frozen target and give features of the rows they are asked for. Whoever asks decides which rows and in
which order, so a training run that stops goes on at its position: no queue between the two forgets what it held. An
actor that dies is started again and given its request again.

bfloat16 travels as its bits in int16: numpy arrays are read from shared memory without a copy, and have no bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import artifact
from pipeline.actors import num_gpus
from pipeline.config import FeaturesConfig, TargetConfig
from pipeline.corpus.build import RowReader, Split
from pipeline.features.extract import check, with_layers
from pipeline.features.forward import feature_rows
from pipeline.features.store import FeatureRow
from pipeline.target import load_target

_WAIT_SECONDS = 60.0


class StreamExtractor:
    """Gives features of training rows; loads the target at the first request."""

    def __init__(self, config: FeaturesConfig, target: TargetConfig, corpus: str, split: Split, cache: str) -> None:
        self.config = config
        self.target_config = dataclasses.replace(target, dtype=config.compute_dtype or target.dtype)
        self.rows = RowReader(corpus, split)
        self.cache = Path(cache)
        self.target: Any = None

    def features(self, indices: list[int]) -> list[dict[str, Any] | None]:
        """Feature columns of rows (see `to_feature_row`), in their order; None where they are not finite."""
        torch.set_num_threads(self.config.threads)
        if self.target is None:
            self.target = load_target(self.target_config, self.cache)
        rows = self.rows.rows(indices)
        made = feature_rows(self.target, rows, self.config.target_layer_ids, self.config.batch_tokens)
        return [r if r is None else _columns(r) for r in made]


@dataclasses.dataclass(frozen=True)
class FeatureStream:
    """Extracting actors, and what they have to give. Travels to training workers.

    Attributes:
        rows: how many rows there are; indices run below it.
    """

    actors: Sequence[Any]
    rows: int

    def ask(self, number: int, indices: list[int]) -> Any:
        """Orders features of rows; `number` spreads the orders over the actors."""
        return self.actors[number % len(self.actors)].features.remote(indices)

    def get(self, order: Any) -> list[FeatureRow | None]:
        """Waits for an order; None where features are not finite."""
        import ray

        while not ray.wait([order], timeout=_WAIT_SECONDS)[0]:
            print(
                f"train: no features for {_WAIT_SECONDS:.0f} s. Extracting actors need a CPU each (and a GPU each with "
                "target.device=cuda) beside the training workers.",
                flush=True,
            )
        return [r if r is None else to_feature_row(r) for r in ray.get(order)]


def feature_stream(
    config: FeaturesConfig,
    target: TargetConfig,
    corpus_dir: Path | str,
    cache_dir: Path | str,
    split: Split = "train",
) -> FeatureStream:
    """Starts `config.actors` extracting actors over the rows of a split, which end with this process. Ray must be
    initialised. Every pass over the rows runs the target again.

    Raises:
        ConfigError, ArtifactError, DraftlineError: as `extract`, before anything runs.
    """
    import ray

    config = with_layers(config, target, cache_dir)
    count, _ = check(config, target, corpus_dir, cache_dir, split)
    artifact.load(corpus_dir, "corpus")  # hashed here, once; the actors only read what they are asked for
    gpus = num_gpus(target, config.gpus_per_actor) or 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=3)(StreamExtractor)
    places = (str(Path(corpus_dir).absolute()), split, str(Path(cache_dir).absolute()))
    return FeatureStream([actor.remote(config, target, *places) for _ in range(config.actors)], count)


def _columns(r: FeatureRow) -> dict[str, Any]:
    return {
        "sample_id": r.sample_id,
        "input_ids": r.input_ids.numpy().astype(np.int32),
        "loss_mask": r.loss_mask.numpy(),
        "taps": r.taps.view(torch.int16).numpy(),
        "last_hidden": r.last_hidden.view(torch.int16).numpy(),
    }


def to_feature_row(row: dict[str, Any]) -> FeatureRow:
    """The FeatureRow of one row's columns."""
    # Copies: what Ray's shared memory backs is read-only, and stays there as long as somebody holds it.
    bits = {k: torch.from_numpy(row[k].copy()).view(torch.bfloat16) for k in ("taps", "last_hidden")}
    ids, mask = torch.from_numpy(row["input_ids"].astype(np.int64)), torch.from_numpy(row["loss_mask"].copy())
    return FeatureRow(row["sample_id"], ids, mask, bits["taps"], bits["last_hidden"])
