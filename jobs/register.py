"""Registers the measured draft as a new version with alias `challenger`.

ray job submit --working-dir . -- python jobs/register.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

import json

from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.entry import StageRecord, run


def registered_name(config: PipelineConfig) -> str:
    """`tracking.model_name`, or one derived from the calibrated draft's target and algorithm."""
    from pipeline.registry.promotion import model_name

    if config.tracking.model_name:
        return config.tracking.model_name
    draft = config.run_dir / "calibrated"
    target = artifact.load(draft, "draft", verify=False).target or {}
    # The draft's own word: one that was converted is not what the run's settings would train.
    return model_name(target["id"], json.loads((draft / "config.json").read_text())["algorithm"])


def stage(config: PipelineConfig, parent: str | None = None) -> str:
    from pipeline.evaluation.parity import require_parity
    from pipeline.registry.promotion import register

    name = registered_name(config)
    print("== register", flush=True)
    with StageRecord("register", config, parent) as record:
        draft, report = config.run_dir / "calibrated", config.run_dir / "report"
        require_parity(config.run_dir / "parity", artifact.load(draft, "draft", verify=False).digest)
        version = register(record.recorder, record.begin(), name, draft, report)
    print(f"== register: {name} version {version}", flush=True)
    return version


if __name__ == "__main__":
    sys.exit(run(stage, name="register", ray=False))
