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
from pipeline.errors import ConfigError

CALIBRATED, TRAINED = "calibrated", "trained"


def chosen(config: PipelineConfig) -> tuple[Path, str]:
    """The draft of `export.version`: its directory, and in words where it is from.

    Raises:
        ConfigError: a registered version is asked for, but the run has only a trained draft.
    """
    from pipeline.registry.versions import lookup, registered_name

    which = config.export.version
    if which == CALIBRATED:
        return config.run_dir / CALIBRATED, f"calibrated draft of the run {config.name}"
    if which == TRAINED:
        return config.run_dir / "draft", f"draft of the run {config.name} as trained, neither calibrated nor measured"
    if Path(which).is_dir():
        return Path(which), f"draft at {Path(which).absolute()}"
    unnamed = not config.tracking.model_name and not (config.run_dir / CALIBRATED).is_dir()
    if unnamed and (config.run_dir / "draft").is_dir():
        raise ConfigError(
            f"export.version={which!r} is a registered version, and the run {config.name} has a trained draft only. "
            "Calibrate, check, evaluate and register it, or export it as it is with export.version=trained; where the "
            "engine does not decode the target (deepseek_v4), that is the way."
        )
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
