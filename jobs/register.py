"""Registers the measured draft as a new version with alias `challenger`.

ray job submit --working-dir . -- python jobs/register.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from pathlib import Path

from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.entry import StageRecord, run
from pipeline.errors import ArtifactError


def stage(config: PipelineConfig, parent: str | None = None) -> str:
    from pipeline.evaluation.parity import require_parity
    from pipeline.registry.registration import register
    from pipeline.registry.versions import registered_name

    name = registered_name(config)
    print("== register", flush=True)
    with StageRecord("register", config, parent) as record:
        draft, report = config.run_dir / "calibrated", config.run_dir / "report"
        manifest = artifact.load(draft, "draft", verify=False)
        require_parity(config.run_dir / "parity", manifest.digest)
        _check_target(config, manifest)
        version = register(record.recorder, record.begin, name, draft, report)
        begun = record.begun
    print(
        f"== register: {'' if begun else 'skipped, draft and report unchanged: '}{name} version {version}", flush=True
    )
    return version


def _check_target(config: PipelineConfig, draft: artifact.Manifest) -> None:
    """Raises ArtifactError where the draft would get the name of another target's."""
    from pipeline.identity import same_target
    from pipeline.target import load_identity, target_id

    made = (draft.target or {}).get("id")
    if not config.tracking.model_name and made != target_id(config.target):
        # Where it lies now it may go by another name. What isn't on this machine is not fetched to find out.
        here = Path(config.target.path).is_dir()
        if here and same_target(draft.target, load_identity(config.target, config.cache).as_dict()):
            return
        raise ArtifactError(
            f"The draft at {config.run_dir / 'calibrated'} was made for the target {made!r}, and "
            f"target.path={config.target.path!r} is {target_id(config.target)!r}. Give the target that it was made for."
        )


if __name__ == "__main__":
    sys.exit(run(stage, name="register", ray=False, settings=("tracking",), page="registry"))
