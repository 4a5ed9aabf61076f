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
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.entry import record, recorder, run
from pipeline.errors import ArtifactError, ConfigError, UnknownVersion
from pipeline.training.trainer import is_trained, train

if TYPE_CHECKING:
    from pipeline.registry.recorder import Recorder
    from pipeline.registry.versions import DraftVersion


def former(config: PipelineConfig) -> Path | None:
    """The draft of `trainer.warm_start.draft`: its directory, if one is named."""
    which = config.trainer.warm_start.draft
    if not which:
        return None
    if Path(which).is_dir():
        return Path(which)
    from pipeline.registry.versions import lookup, registered_name

    kept, name = recorder(config), registered_name(config)
    try:
        found = lookup(kept, name, which, config.cache / "champions")
        if not which.isdigit() and (before := _before_own(config, kept, found)) is not None:
            found = lookup(kept, name, before, config.cache / "champions")
        return found.draft_dir
    except UnknownVersion as e:
        raise ConfigError(
            f"trainer.warm_start.draft={which!r} is neither a draft's directory ({Path(which).absolute()} is none) nor "
            f"a version or alias of the registered model: {e}"
        ) from None


def _before_own(config: PipelineConfig, kept: Recorder, found: DraftVersion) -> str | None:
    """The version that this run's draft was trained from, where an alias has come to name that very draft: it moved
    because of this run, which has nothing to do anew. None where the alias names another's draft, or where the corpus
    or a setting is another now: then the run's own draft is what the next one starts from.

    Raises:
        ConfigError: there is no such version any more.
    """
    from pipeline.registry.versions import version_of

    which = config.trainer.warm_start.draft
    try:
        own = artifact.load(config.run_dir / "draft", "draft", verify=False)
    except ArtifactError:
        return None
    digest = own.inputs.get("former")
    if found.tags.get("input.draft") != own.digest or digest is None:
        return None
    if not is_trained(config, former=digest, **_places(config)):
        return None
    before = version_of(kept, found.name, digest)
    if before is None:
        raise ConfigError(
            f"trainer.warm_start.draft={which!r} names this run's own draft now (version {found.version}), and of the "
            f"former that it was trained from (digest {digest[:16]}) {found.name} has no version. Pin a version: "
            "trainer.warm_start.draft=<number>."
        )
    print(f"train: {which} is this run's own draft; its former stays version {before}", flush=True)
    return before


def _places(config: PipelineConfig) -> dict[str, Any]:
    """Where the stage reads and writes."""
    root = config.run_dir
    features = None if config.features.mode == "stream" else root / "features"
    return {"features_dir": features, "corpus_dir": root / "corpus", "out": root / "draft", "cache_dir": config.cache}


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    root, out = config.run_dir, config.run_dir / "draft"
    start = former(config)
    return record(
        "train",
        config,
        lambda begin: train(
            config,
            **_places(config),
            run_dir=root,
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
