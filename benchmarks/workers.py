"""The same training on one worker and on two, by ZeRO stage: loss curves, memory per rank, speed.

python benchmarks/workers.py --run outputs/demo --steps 16 --json workers.json

Takes the corpus and the features of a finished demo and trains its draft anew for a few steps, as the job does (Ray
Train, DeepSpeed), in a directory that is removed again. Rows, anchors and the weight of a token do not depend on the
number of workers, so the curves must be the same up to the rounding of sums in another order (in fp32: products in bf16
round more, and otherwise for other shapes): the last column is the
largest relative difference from the first row's, over every step, of loss, tau and acceptance of the first two
positions. memory is the
mean over ranks of the highest resident set, mapped feature files included (on CUDA the allocator's peak); sharded is
what the rank with the most keeps of fp32 weights and moments in its checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.local.cluster import KEEP_FREED
from pipeline.artifact import write_json
from pipeline.entry import compose
from pipeline.training.trainer import history, train

QUALITY = ("loss", "tau", "acceptance_1", "acceptance_2")


def one(config: Any, run: Path, workers: int, stage: int) -> dict[str, Any]:
    """Trains once; what its history says."""
    deepspeed = {**config.deepspeed, "zero_optimization": {"stage": stage}}
    trainer = dataclasses.replace(config.trainer, workers=workers, threads_per_worker=2 // workers)
    made = dataclasses.replace(config, trainer=trainer, deepspeed=deepspeed)
    scratch = Path(tempfile.mkdtemp(prefix="workers-", dir=run))
    try:
        manifest = train(
            made,
            features_dir=run / "features",
            corpus_dir=run / "corpus",
            out=scratch / "draft",
            run_dir=scratch,
            cache_dir=config.cache,
        )
        lines = history(scratch, manifest)
        parts = scratch.glob("train/draft-*/step_*/deepspeed/*optim_states.pt")
        return {
            "workers": workers,
            "stage": stage,
            "curve": [{k: line[k] for k in QUALITY} for line in lines],
            "anchors_per_second": lines[-1]["anchors_per_second"],
            "memory_gib": lines[-1]["memory_gib"],
            "sharded_mib": max(p.stat().st_size for p in parts) / 2**20,
        }
    finally:
        shutil.rmtree(scratch)


def furthest(curve: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Largest relative difference of two curves."""
    assert len(curve) == len(other) and curve, "the runs reported other steps"
    return max(abs(a[k] - b[k]) / max(abs(b[k]), 1e-9) for a, b in zip(curve, other, strict=True) for k in b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"), help="of a finished demo")
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--cache", default=".cache/draftline")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    settings = [
        f"trainer.steps={args.steps}",
        "trainer.log_every=1",
        "trainer.checkpoint_every=1000",
        "trainer.autocast=",
    ]
    places = [f"cache_dir={Path(args.cache).absolute()}", f"output_root={args.run.absolute().parent}"]
    config = compose([f"experiment={args.experiment}", *settings, *places])
    os.environ.update(KEEP_FREED)  # as the demo's cluster has it
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    results: list[dict[str, Any]] = []
    print(
        f"{'ZeRO':>4}{'workers':>9}{'last loss':>11}{'memory GiB':>12}{'sharded MiB':>13}{'anchors/s':>11}  differs by"
    )
    for stage in (int(s) for s in args.stages.split(",")):
        for workers in (1, 2):
            r = one(config, args.run.absolute(), workers, stage)
            results.append(r)
            r["differs"] = furthest(r["curve"], results[0]["curve"])
            print(
                f"{stage:>4}{workers:>9}{r['curve'][-1]['loss']:>11.4f}{r['memory_gib']:>12.2f}{r['sharded_mib']:>13.1f}"
                f"{r['anchors_per_second']:>11.0f}  {r['differs']:.1e}",
                flush=True,
            )
    ray.shutdown()
    if args.json:
        write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "runs": results})


if __name__ == "__main__":
    main()
