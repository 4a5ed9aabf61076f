"""Fits the draft's confidence temperatures on held-out rounds (sequential temperature scaling).

ray job submit --working-dir . -- python jobs/calibrate.py experiment=demo \\
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


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    from pipeline.evaluation.stages import calibrate_draft

    root, out = config.run_dir, config.run_dir / "calibrated"
    return record(
        "calibrate",
        config,
        lambda begin: calibrate_draft(
            root / "draft", config.target, root / "corpus", config.engine, config.benchmark, out, config.cache, begin
        ),
        out,
        sources={"draft": root / "draft", "corpus": root / "corpus"},
        parent=parent,
        metrics=lambda m: {f"temperature_{k}": t for k, t in enumerate(m.info["calibration"]["temperatures"], 1)},
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="calibrate", ray=False, settings=("benchmark", "engine")))
