"""Measures the calibrated draft against plain decoding by the same engine; writes report.json and report.html.

ray job submit --working-dir . -- python jobs/evaluate.py experiment=demo \\
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
    from pipeline.evaluation.stages import evaluate_draft

    root, out = config.run_dir, config.run_dir / "report"
    return record(
        "evaluate",
        config,
        lambda begin: evaluate_draft(
            root / "calibrated",
            config.target,
            root / "corpus",
            config.engine,
            config.benchmark,
            out,
            config.cache,
            begin,
        ),
        out,
        sources={"draft": root / "calibrated", "corpus": root / "corpus"},
        parent=parent,
        metrics=lambda m: m.info["headline"],
        files=("report.json", "report.html"),
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="evaluate", ray=False, settings=("benchmark", "engine")))
