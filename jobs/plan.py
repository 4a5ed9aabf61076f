"""What an experiment takes before anybody pays for it: features, memory, GPU-hours. Needs no cluster and no weights.

python jobs/plan.py experiment=qwen3_4b_dspark corpus.source=own.jsonl corpus.regenerate.prompts=own.jsonl \\
    tracking.uri=http://mlflow:5000

Exit status 5 where the experiment would not fit the cluster of its config.
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from pipeline.config import PipelineConfig
from pipeline.entry import run

DOES_NOT_FIT = 5


def main(config: PipelineConfig) -> None:
    from pipeline.sizing import plan, save, show

    found = plan(config)
    print(show(found))
    save(found, config.run_dir / "plan.json")
    if found.obstacles:
        raise SystemExit(DOES_NOT_FIT)


if __name__ == "__main__":
    sys.exit(run(main, name="plan", ray=False, settings=("plan", "cluster"), page="plan"))
