"""Hidden-state features of the corpus' training rows, through the frozen target on Ray Data.

ray job submit --working-dir . -- python jobs/extract.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

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
