"""The main job on a Ray cluster of its own: what `make demo` runs.

python infra/local/demo.py --experiment demo
python infra/local/demo.py --experiment smoke
python infra/local/demo.py --experiment demo --job serve      (until Ctrl-C)

Ends with the job's own exit status. Anything after `--` goes to the job: `-- trainer.steps=100`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from infra.local.cluster import LocalCluster, local_cluster  # noqa: E402
from pipeline.artifact import code_version  # noqa: E402
from pipeline.entry import compose  # noqa: E402
from pipeline.errors import DraftlineError  # noqa: E402


def submit(cluster: LocalCluster, job: str, overrides: list[str]) -> int:
    """Submits `jobs/<job>.py` with the real command line, streams its log, and returns its exit status."""
    submission = f"{job}-{secrets.token_hex(4)}"
    # The uploaded working directory has no .git, so the job is told which code it is.
    runtime_env = {"env_vars": {"DRAFTLINE_CODE_VERSION": code_version(), "PYTHONUNBUFFERED": "1"}}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", submission,
        "--working-dir", ".", "--runtime-env-json", json.dumps(runtime_env),
        "--", "python", f"jobs/{job}.py", *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=cluster.client_env())
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    # The command line ends with 1 for any failed job; the job's own status says why (2: mendable, 3: refused).
    with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
        code = json.loads(cluster.get(f"{cluster.api}/api/jobs/{submission}")).get("driver_exit_code")
        if status and code:
            return int(code)
    return status


def fixed(overrides: list[str]) -> list[str]:
    """Of a sweep's settings those that every trial has."""
    from jobs.sweep import parse

    return parse(overrides).fixed


def show(summary_file: Path) -> None:
    """Prints the figures of a finished pipeline, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    summary: dict[str, Any] = json.loads(summary_file.read_text())
    table = Table(title=f"The draft for {summary['target']}", title_justify="left", show_header=False)
    for key, value in summary.items():
        if key not in ("target", "draft", "mlflow_uri", "report"):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console = Console(width=max(100, Console().width))
    console.print(table)
    places = {"draft": summary["draft"], "report": summary["report"], "summary": summary_file}
    for name, place in places.items():
        print(f"{name + ':':<11}{place}")
    print(f"{'runs:':<11}.venv/bin/mlflow ui --backend-store-uri {summary['mlflow_uri']}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo", help="one of conf/experiment")
    parser.add_argument("--job", default="pipeline", help="one of jobs/")
    parser.add_argument("--output-root", default=str(ROOT / "outputs"))
    parser.add_argument("overrides", nargs="*", help="further settings, name=value")
    args = parser.parse_args(argv)
    if not (ROOT / "jobs" / f"{args.job}.py").is_file():
        names = ", ".join(sorted(p.stem for p in (ROOT / "jobs").glob("[a-z]*.py")))
        parser.error(f"--job {args.job}: there is no such job. There are: {names}.")
    cache = os.environ.get("DRAFTLINE_CACHE", str(ROOT / ".cache" / "draftline"))
    overrides = [
        f"experiment={args.experiment}",
        f"output_root={Path(args.output_root).absolute()}",
        f"cache_dir={Path(cache).absolute()}",
        *args.overrides,
    ]
    try:
        # A mistake in a setting must not cost the start of a cluster.
        config = compose(fixed(overrides) if args.job == "sweep" else overrides)
        print(f"Starting a local Ray cluster ({config.cluster.num_cpus} logical CPUs) ...", flush=True)
        with local_cluster(config.cluster.num_cpus, config.cluster.object_store_gib) as cluster:
            status = submit(cluster, args.job, overrides)
    except DraftlineError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; the cluster is stopped. Run it again to go on from here.", file=sys.stderr)
        return 130
    summary = config.run_dir / "summary.json"
    if status == 0 and args.job == "pipeline":
        show(summary)
    return status


if __name__ == "__main__":
    sys.exit(main())
