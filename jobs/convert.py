"""Reads a checkpoint of DeepSpec, speculators or SpecForge as the run's draft, in the place of training.

ray job submit --working-dir . -- python jobs/convert.py experiment=demo name=theirs \\
    convert.checkpoint=/models/their-draft output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
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
    from pipeline.drafts.formats.conversion import convert_draft

    out = config.run_dir / "draft"
    return record(
        "convert",
        config,
        lambda begin: convert_draft(config.convert, config.target, out, config.cache, begin=begin),
        out,
        sources={"checkpoint": config.convert.checkpoint},
        parent=parent,
        files=("config.json",),
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="convert", ray=False, settings=("convert",), page="convert"))
