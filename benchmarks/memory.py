"""What a job on a local cluster holds of the machine's memory: its peak, and the peak of every stage.

python benchmarks/memory.py --json memory.json
python benchmarks/memory.py --job train -- trainer.steps=84

Runs the job as `make demo` does and reads, twice a second, the proportional share of memory of every process of its
cluster and of what started it: anonymous (a process' own), shared memory (Ray's object store) and mapped files.
The kernel takes back pages of files when it needs room, so what must fit is the first two. A stage is named by the last
line of the job that begins with its name.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infra.local.cluster import MARK  # noqa: E402
from pipeline.artifact import write_json  # noqa: E402

KINDS = ("Anon", "Shmem", "File")


def shares(root: int) -> dict[int, tuple[str, list[float]]]:
    """Name and GiB by `KINDS` of every process that descends from one or belongs to a local cluster."""
    found, parents = {}, {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        place, above = Path(f"/proc/{pid}"), pid
        while above not in (0, 1, root):
            above = parents.get(above, 0)
        with contextlib.suppress(OSError):
            if above == root or MARK.encode() in (place / "environ").read_bytes():
                text = (place / "smaps_rollup").read_text()
                each = [re.search(rf"^Pss_{k}: +(\d+)", text, re.MULTILINE) for k in KINDS]
                name = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[pid] = name[:48], [int(m[1]) / 2**20 if m else 0.0 for m in each]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--job", default="pipeline")
    parser.add_argument("--output-root", default="outputs/memory")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "infra/local/demo.py"), "--experiment", args.experiment, "--job", args.job]
    command += ["--output-root", args.output_root, "--", *args.overrides]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    stage, stop = ["start"], threading.Event()
    peaks: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    largest: dict[str, list[tuple[str, list[float]]]] = {}

    def sample() -> None:
        while not stop.wait(0.5):
            each = shares(os.getpid())
            total = [sum(kinds[i] for _, kinds in each.values()) for i in range(len(KINDS))]
            held, peak = total[0] + total[1], peaks[stage[0]]
            if held > peak[0]:
                peaks[stage[0]] = [held, *total]
                largest[stage[0]] = sorted(each.values(), key=lambda e: -e[1][0])[:4]

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        assert job.stdout is not None
        for line in job.stdout:
            if known := re.match(r"(?:\(.*?\) |== )?([a-z]+): ", re.sub(r"\x1b\[\d*m", "", line)):
                stage[0] = known[1]
            print(line, end="", flush=True)
    finally:
        status = job.wait()
        stop.set()
        sampler.join()
    print(f"\n{'stage':<14}{'held GiB':>10}{'own':>8}{'shared':>8}{'files':>8}  largest (own)")
    for name, (held, *each) in peaks.items():
        who = ", ".join(f"{n.split()[0]} {k[0]:.2f}" for n, k in largest[name])
        print(f"{name:<14}{held:>10.2f}" + "".join(f"{v:>8.2f}" for v in each) + f"  {who}")
    print(f"{'peak':<14}{max(p[0] for p in peaks.values()):>10.2f}")
    if args.json:
        stages = {n: dict(zip(("held", *KINDS), p, strict=True)) for n, p in peaks.items()}
        write_json(args.json, {"status": status, "gib": stages})
    return status


if __name__ == "__main__":
    sys.exit(main())
