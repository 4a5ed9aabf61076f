"""What training's reports cost: the same run with Ray Train's own poll of its workers (2 s) and with draftline's.

python benchmarks/reports.py --run outputs/demo --steps 24 --turns 3 --json reports.json

A worker's report is taken in when Ray Train's controller polls, and its next one waits until then. Trains the
experiment's draft on the features of a finished run as the job does, two workers, a report every step, in a directory
that is removed again; both sides in turn, on one cluster. Anchors per second are the run's own, from its first step on;
their ratio is the geometric mean over the turns, with its bootstrap interval of 95 %.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import ray
from turns import ratio
from workers import one

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.local.cluster import KEEP_FREED
from pipeline.artifact import write_json
from pipeline.entry import compose
from pipeline.training.trainer import POLL_INTERVAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"), help="of a finished run")
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cache", default=".cache/draftline")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    run = args.run.absolute()
    config = compose(
        [
            f"experiment={args.experiment}",
            f"trainer.steps={args.steps}",
            "trainer.log_every=1",
            "trainer.checkpoint_every=1000",
            f"cache_dir={Path(args.cache).absolute()}",
            f"output_root={run.parent}",
        ]
    )
    os.environ.update(KEEP_FREED)  # as the demo's cluster has it
    os.environ.pop(POLL_INTERVAL, None)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    pairs: list[tuple[float, float]] = []
    for turn in range(args.turns):
        rates = {}
        for side in ("ray", "draftline") if turn % 2 else ("draftline", "ray"):
            if side == "ray":
                os.environ[POLL_INTERVAL] = "2.0"
            rates[side] = one(config, run, 2, 2)["anchors_per_second"]
            os.environ.pop(POLL_INTERVAL, None)
        pairs.append((rates["draftline"], rates["ray"]))
        print(f"turn {turn + 1}: {rates['draftline']:.0f} anchors/s, every 2 s {rates['ray']:.0f}", flush=True)
    ray.shutdown()
    mean, low, high = ratio(pairs)
    print(f"draftline's poll over Ray Train's own, a report every step: {mean:.3f} [{low:.3f}, {high:.3f}]")
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        write_json(args.json, {"settings": settings, "anchors_per_second": pairs, "ratio": [mean, low, high]})


if __name__ == "__main__":
    main()
