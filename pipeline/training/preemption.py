"""SIGTERM asks a training run to save and end: sent to a worker (a node that goes away) or to the job.

A worker's handler only sets a flag. The ranks add their flags up at every step, so all of them stop behind the same
one. The job's handler rings a small actor that rank 0 listens to (a file on shared storage may be seen a minute late).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

_asked = threading.Event()


class HeedSigterm(WorkerGroupCallback):
    """Installs the handler in every training worker: training runs in a thread there, and Python takes handlers only
    from a process's main thread, which is where Ray Train executes this."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(_heed)


def _heed() -> None:
    _asked.clear()
    signal.signal(signal.SIGTERM, lambda *_: _asked.set())


class _Bell:
    def __init__(self) -> None:
        self.rung = False

    def ring(self) -> None:
        self.rung = True

    def heard(self) -> bool:
        return self.rung


@contextlib.contextmanager
def bell() -> Iterator[Any]:
    """An actor handle for `Listener`; while the block lasts, SIGTERM to this process rings it and does nothing else.

    Outside of a process's main thread no handler can be set, and SIGTERM does what it did before.
    """
    import ray

    actor: Any = ray.remote(_Bell).options(num_cpus=0).remote()  # type: ignore[attr-defined]
    main = threading.current_thread() is threading.main_thread()

    def ring(*_: Any) -> None:
        actor.ring.remote()

    before = signal.signal(signal.SIGTERM, ring) if main else None
    try:
        yield actor
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        ray.kill(actor)


class Listener:
    """What a worker knows of requests to stop. Asking costs nothing: the bell's answer is awaited beside the steps."""

    def __init__(self, actor: Any, rank: int) -> None:
        self._actor = actor if rank == 0 else None
        self._answer: Any = None

    def asked(self) -> bool:
        """Whether this worker got SIGTERM or, on rank 0, the job did."""
        import ray

        if self._actor is not None:
            if self._answer is None:
                self._answer = self._actor.heard.remote()
            elif ray.wait([self._answer], timeout=0)[0]:
                if ray.get(self._answer):
                    _asked.set()
                self._answer = self._actor.heard.remote()
        return _asked.is_set()
