"""Hidden-state features of the corpus' training rows, through the frozen target on Ray Data.

ray job submit --working-dir . -- python jobs/extract.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.entry import record, run
from pipeline.features.extract import extract


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    root, out = config.run_dir, config.run_dir / "features"
    return record(
        "extract",
        config,
        lambda begin: extract(config.features, config.target, root / "corpus", out, config.cache, begin=begin),
        out,
        sources={"corpus": root / "corpus"},
        parent=parent,
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="extract", settings=("features", "target")))
