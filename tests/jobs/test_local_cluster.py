"""The local cluster comes up on ports of its own, takes a job, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.local.cluster import MARK, PORTS, _terminable, local_cluster
from pipeline.errors import DraftlineError

ROOT = Path(__file__).resolve().parent.parent.parent


def marked(mark: str) -> list[int]:
    """Processes with a cluster's mark, found without the cluster's own help."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def heed_signals() -> None:
    """Tests started from a background job or under nohup ignore these, and so would what they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_a_cluster_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _terminable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(DraftlineError, match=f"Port {port} for Ray's dashboard-port"),
            local_cluster(ports={"dashboard-port": port}),
        ):
            pytest.fail("it started")


@pytest.mark.ray
def test_a_failing_block_leaves_no_process_and_no_directory() -> None:
    with pytest.raises(RuntimeError, match="the block failed"), local_cluster() as cluster:
        assert len(set(cluster.ports.values())) == len(PORTS)
        assert json.loads(cluster.get(f"{cluster.api}/api/version"))["ray_version"]
        assert marked(cluster.mark)
        raise RuntimeError("the block failed")
    assert marked(cluster.mark) == []
    assert not cluster.temp_dir.exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_stops_the_cluster(number: signal.Signals) -> None:
    program = (
        "import time\nfrom infra.local.cluster import local_cluster\n"
        "with local_cluster() as c:\n    print(c.mark, c.temp_dir, flush=True)\n    time.sleep(120)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    mark, temp_dir = process.stdout.readline().split()
    assert marked(mark)
    process.send_signal(number)
    process.wait(60)
    time.sleep(0.5)
    assert process.returncode != 0
    assert marked(mark) == []
    assert not Path(temp_dir).exists()
