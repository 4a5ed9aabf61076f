"""Sharded draft training on Ray Train with DeepSpeed; goes on where an interrupted run stopped.

ray job submit --working-dir . -- python jobs/train.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from pathlib import Path

from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.entry import record, recorder, run
from pipeline.errors import ConfigError, UnknownVersion
from pipeline.training.trainer import train


def former(config: PipelineConfig) -> Path | None:
    """The draft of `trainer.warm_start.draft`: its directory, if one is named."""
    which = config.trainer.warm_start.draft
    if not which:
        return None
    if Path(which).is_dir():
        return Path(which)
    from pipeline.registry.promotion import lookup, registered_name

    name = registered_name(config)
    try:
        return lookup(recorder(config), name, which, config.cache / "champions").draft_dir
    except UnknownVersion as e:
        raise ConfigError(
            f"trainer.warm_start.draft={which!r} is neither a draft's directory ({Path(which).absolute()} is none) nor "
            f"a version or alias of the registered model: {e}"
        ) from None


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    root, out = config.run_dir, config.run_dir / "draft"
    start = former(config)
    features = None if config.features.mode == "stream" else root / "features"
    return record(
        "train",
        config,
        lambda begin: train(
            config,
            features_dir=features,
            corpus_dir=root / "corpus",
            out=out,
            run_dir=root,
            cache_dir=config.cache,
            former_dir=start,
            begin=begin,
        ),
        out,
        sources={"corpus": root / "corpus", "features": root / "features", "former": start or ""},
        parent=parent,
        metrics=lambda m: {f"final.{k}": v for k, v in m.info["training"].items() if isinstance(v, float)},
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="train", settings=("trainer", "trainer.warm_start", "draft"), page="training"))
