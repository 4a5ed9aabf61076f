"""Compares training and engine for the calibrated draft; one that fails can't be registered (exit status 4).

ray job submit --working-dir . -- python jobs/parity.py experiment=demo \\
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

FAILED = 4


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    from pipeline.evaluation.parity import check_parity

    root, out = config.run_dir, config.run_dir / "parity"
    features = None if config.features.mode == "stream" else root / "features"
    draft, corpus = root / "calibrated", root / "corpus"
    return record(
        "parity",
        config,
        lambda begin: check_parity(
            draft, config.target, corpus, features, config.engine, config.parity, out, config.cache, begin
        ),
        out,
        sources={"draft": draft, "corpus": corpus, "features": root / "features"},
        parent=parent,
        metrics=lambda m: {"passed": float(m.info["passed"])},
        files=("parity.json",),
    )


def require(config: PipelineConfig, manifest: Manifest) -> None:
    """Says why a draft failed, also one that was checked before, and ends with status 4."""
    from pipeline.evaluation.parity import ParityError, require_parity

    try:
        require_parity(config.run_dir / "parity", manifest.inputs["draft"])
    except ParityError as e:
        print(f"parity: {e}", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from None


def main(config: PipelineConfig) -> None:
    require(config, stage(config))


if __name__ == "__main__":
    sys.exit(run(main, name="parity", ray=False, settings=("parity", "engine")))
