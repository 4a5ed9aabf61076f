"""Lets the gate decide about the challenger: moves `champion`, or refuses with exit status 3.

ray job submit --working-dir . -- python jobs/promote.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from typing import Any

from pipeline.config import PipelineConfig
from pipeline.entry import StageRecord, run

REFUSED = 3


def stage(config: PipelineConfig, parent: str | None = None, version: str | None = None) -> Any:
    """The gate's decision about a version, by its number; None: about the challenger of now."""
    from pipeline.registry.promotion import promote
    from pipeline.registry.versions import fetch, registered_name

    print("== promote", flush=True)
    with StageRecord("promote", config, parent) as record:

        def compare(challenger: Any, champion: Any) -> dict[str, Any]:
            from pipeline.evaluation.stages import compare_drafts

            print(f"promote: measures version {challenger.version} beside the champion, {champion.version}", flush=True)
            root, cache = config.run_dir, config.cache / "champions"
            return compare_drafts(
                fetch(record.recorder, challenger, cache).draft_dir,
                fetch(record.recorder, champion, cache).draft_dir,
                config.target,
                root / "corpus",
                config.engine,
                config.benchmark,
                root / "comparison",
                config.cache,
                record.begin,
            )

        decision = promote(record.recorder, record.begin, registered_name(config), config.gate, compare, version)
        begun = record.begun
    if begun or not decision.promoted:
        print(decision.text(), flush=True)
    if not begun:
        print(f"== promote: skipped, the gate says what it said before ({decision.verdict})", flush=True)
    return decision


def main(config: PipelineConfig) -> None:
    if not stage(config).promoted:
        raise SystemExit(REFUSED)


if __name__ == "__main__":
    sys.exit(run(main, name="promote", ray=False, settings=("gate", "benchmark"), page="registry"))
