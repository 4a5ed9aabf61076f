"""Hidden-state features of the corpus' training rows, through the frozen target on Ray Data.

ray job submit --working-dir . -- python jobs/extract.py experiment=demo
"""

from __future__ import annotations

import sys

from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.entry import record, run
from pipeline.features.extract import extract


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    root, out = config.run_dir, config.run_dir / "features"
    return record(
        "extract",
        config,
        lambda: extract(config.features, config.target, root / "corpus", out, config.cache),
        out,
        parent=parent,
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="extract"))
