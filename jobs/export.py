"""Writes a draft as a directory that vLLM or SGLang takes as it is, with the launch command in its README.

ray job submit --working-dir . -- python jobs/export.py experiment=demo export.engine=sglang \\
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

CALIBRATED = "calibrated"


def chosen(config: PipelineConfig) -> tuple[Path, str]:
    """The draft of `export.version`: its directory, and in words where it is from."""
    from pipeline.registry.promotion import lookup, registered_name

    which = config.export.version
    if which == CALIBRATED:
        return config.run_dir / CALIBRATED, f"calibrated draft of the run {config.name}"
    found = lookup(recorder(config), registered_name(config), which, config.cache / "champions")
    return found.draft_dir, f"{found.name} version {found.version}"


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    from pipeline.drafts.formats.export import export_draft

    draft_dir, source = chosen(config)
    e = config.export
    out = Path(e.out).absolute() if e.out else config.run_dir / f"export-{e.engine}"
    return record(
        "export",
        config,
        lambda begin: export_draft(draft_dir, config.target, e, out, config.cache, source=source, begin=begin),
        out,
        sources={"draft": draft_dir},
        parent=parent,
        files=("config.json", "README.md"),
    )


if __name__ == "__main__":
    sys.exit(run(stage, name="export", ray=False, settings=("export",), page="export"))
