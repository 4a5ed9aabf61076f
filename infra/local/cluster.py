"""A Ray head on this machine for one job's time: its own ports, token and directory, and nothing left behind.

    with local_cluster(num_cpus=4) as cluster:
        subprocess.run(["ray", "job", "submit", ..., "--", "python", "jobs/pipeline.py"], env=cluster.client_env())

It is stopped on success, failure, Ctrl-C, SIGTERM and SIGHUP (a closed terminal), and only it: every process that it
starts inherits a mark in its environment, and those processes are the ones that are ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.errors import DraftlineError

MARK = "DRAFTLINE_LOCAL_CLUSTER"
# By default glibc gives large blocks back to the kernel as they are freed, and a training step takes them all again.
# Blocks past 64 MiB still go back: kept too, they left a training worker of the demo at 4.2 GiB instead of 2.0, and it
# was no faster (benchmarks/memory.py --job train).
KEEP_FREED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Ray Serve replaces an HTTP proxy that is not ready in 5 seconds, which starting Python takes on a busy machine: it
# would never come up.
PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
START_SECONDS = 120.0
STOP_SECONDS = 15.0
# Ray's defaults for these are fixed numbers: two clusters on a host take each other's agents for their own.
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclasses.dataclass(frozen=True)
class LocalCluster:
    """A running head. ports: by the names of `ray start`'s options. token: what clients must send."""

    ports: dict[str, int]
    token: str
    mark: str
    temp_dir: Path

    @property
    def api(self) -> str:
        """Address of the Jobs API."""
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def client_env(self) -> dict[str, str]:
        """This process' environment with what Ray's command line needs to reach this cluster and no other."""
        return {**_environment(self.token), "RAY_API_SERVER_ADDRESS": self.api}

    def get(self, url: str) -> bytes:
        """GETs a URL of the cluster with its token."""
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def processes(self) -> list[int]:
        """Ids of the processes that belong to this cluster and live."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for place in Path("/proc").iterdir():
            if place.name.isdigit() and int(place.name) != os.getpid():
                with contextlib.suppress(OSError):
                    state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z" and wanted in (place / "environ").read_bytes().split(b"\0"):
                        found.append(int(place.name))
        return found


@contextlib.contextmanager
def local_cluster(
    num_cpus: int = 4, object_store_gib: float = 1.0, ports: dict[str, int] | None = None
) -> Iterator[LocalCluster]:
    """Starts a head, waits until it takes jobs, and stops it when the block ends, however it ends.

    Args:
        num_cpus: logical CPUs: how many actors and workers may be up at once, not cores.
        ports: fixed ones, by the names in `PORTS`; the others are free ones.
    Raises:
        DraftlineError: a port in use, or a head that did not come up; with the end of its log.
    """
    chosen = _ports(ports or {})
    temp_dir = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))  # short: unix socket paths end at 107 characters
    cluster = LocalCluster(chosen, secrets.token_hex(32), secrets.token_hex(8), temp_dir)
    log = temp_dir / "head.log"
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
        "--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={num_cpus}",
        f"--object-store-memory={int(object_store_gib * 2**30)}", f"--temp-dir={temp_dir / 'ray'}",
        *(f"--{name}={port}" for name, port in chosen.items()),
    ]  # fmt: skip
    with _terminable():
        head: subprocess.Popen[bytes] | None = None
        try:
            with log.open("wb") as out:
                head = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**_environment(cluster.token), **KEEP_FREED, **PATIENT, MARK: cluster.mark},
                )
            _wait_until_ready(cluster, head, log)
            yield cluster
        finally:
            with _undisturbed():
                _stop(cluster, head)
                shutil.rmtree(temp_dir, ignore_errors=True)


def _environment(token: str) -> dict[str, str]:
    """For the head and for clients: the token, this interpreter first on the PATH, none of another cluster's names."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", MARK)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONUNBUFFERED": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    return env


def _ports(fixed: dict[str, int]) -> dict[str, int]:
    if unknown := set(fixed) - set(PORTS):
        raise ValueError(f"unknown ports {sorted(unknown)}")
    chosen = {}
    with contextlib.ExitStack() as held:  # held together, so that no two are the same
        for name in sorted(PORTS, key=lambda n: n not in fixed):
            s = held.enter_context(socket.socket())
            try:
                s.bind(("", fixed.get(name, 0)))  # on every address, as Ray does
            except OSError as e:
                raise DraftlineError(
                    f"Port {fixed[name]} for Ray's {name} can't be used ({e.strerror}). Choose another, or leave it "
                    "out for a free one."
                ) from None
            chosen[name] = int(s.getsockname()[1])
    return chosen


def _wait_until_ready(cluster: LocalCluster, head: subprocess.Popen[bytes], log: Path) -> None:
    # A job goes through the head's agent, which comes up after the dashboard.
    agent = f"http://127.0.0.1:{cluster.ports['dashboard-agent-listen-port']}/api/local_raylet_healthz"
    deadline = time.monotonic() + START_SECONDS
    waiting = [f"{cluster.api}/api/version", agent]
    while waiting:
        if head.poll() is not None or time.monotonic() > deadline:
            why = f"ended with status {head.poll()}" if head.poll() is not None else f"not up in {START_SECONDS:.0f} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise DraftlineError(f"The local Ray head did not start ({why}). The end of its log:\n{tail}")
        try:
            cluster.get(waiting[0])
            waiting.pop(0)
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)


def _stop(cluster: LocalCluster, head: subprocess.Popen[bytes] | None) -> None:
    """Ends every marked process: asked first, killed after a while; again, for what was being started meanwhile."""
    deadline = time.monotonic() + STOP_SECONDS
    number = signal.SIGTERM
    while pids := cluster.processes():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        wait = min(deadline, time.monotonic() + 5)
        while time.monotonic() < wait and cluster.processes():
            if head is not None:
                head.poll()  # reaps it
            time.sleep(0.1)
        number = signal.SIGKILL
        if time.monotonic() > deadline + STOP_SECONDS:
            print(f"Processes {cluster.processes()} of the local Ray cluster could not be ended.", file=sys.stderr)
            break
        if time.monotonic() > deadline:
            time.sleep(0.1)
    if head is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(5)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit (128 + number) within the block, so that it unwinds as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # What was told to outlive its terminal (nohup) ignores SIGHUP, and goes on doing so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before: dict[int, Any] = {n: signal.signal(n, end) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second signal must not leave half a cluster."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {
        n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
