"""Measures the calibrated draft against plain decoding by the same engine; writes report.json and report.html.

ray job submit --working-dir . -- python jobs/evaluate.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

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
