"""Lets the gate decide about the challenger: moves `champion`, or refuses with exit status 3.

ray job submit --working-dir . -- python jobs/promote.py experiment=demo
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

from contextlib import ExitStack
from typing import Any

from jobs.register import registered_name
from pipeline.config import PipelineConfig
from pipeline.entry import recorder, run

REFUSED = 3


def stage(config: PipelineConfig, parent: str | None = None) -> Any:
    from pipeline.registry.promotion import promote

    tracker = recorder(config)
    print("== promote", flush=True)
    with ExitStack() as stack:
        top = parent or stack.enter_context(tracker.running(config.name))
        run_ = stack.enter_context(tracker.stage(top, "promote"))
        decision = promote(tracker, run_, registered_name(config), config.gate)
    print(decision.table(), flush=True)
    return decision


def main(config: PipelineConfig) -> None:
    if not stage(config).promoted:
        raise SystemExit(REFUSED)


if __name__ == "__main__":
    sys.exit(run(main, name="promote", ray=False))
