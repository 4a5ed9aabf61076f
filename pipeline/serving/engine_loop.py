"""The engine's thread: takes requests from an event loop, steps while there is work, hands events back.

The engine is not thread-safe, so everything that touches it (submit, cancel, step) runs here. Requests that arrive
while a step runs join the next one: that is the continuous batching.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from pipeline.decoding.request import Completion, Request, RequestMetrics, RequestRefused, StepEvent

log = logging.getLogger(__name__)

Listener = Callable[[StepEvent], None]


class StepEngine(Protocol):
    """What the loop needs of `pipeline.decoding.Engine`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str, failure: str = "") -> bool: ...
    def step(self) -> list[StepEvent]: ...


class EngineLoop:
    """Runs an engine in a thread of its own.

    Args:
        prepare: called first in that thread, for settings that belong to a thread.
    Attributes:
        error: what ended the thread, if it died.
    """

    def __init__(self, engine: StepEngine, prepare: Callable[[], None] | None = None) -> None:
        self._engine = engine
        self._prepare = prepare
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._listeners: dict[str, Listener] = {}
        self._closing = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="draftline-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def active(self) -> int:
        """Requests submitted and not finished."""
        return len(self._listeners)

    def submit(self, request: Request, listener: Listener) -> concurrent.futures.Future[None]:
        """Hands a request to the engine.

        Args:
            listener: called in the engine's thread with each event of this request; it must not block. One that raises
                is not called again, and its request ends as an error with that cause.
        Returns:
            a future that is done when the engine has the request, or holds the engine's refusal (RequestRefused,
            QueueFull).
        """
        accepted: concurrent.futures.Future[None] = concurrent.futures.Future()

        def do() -> None:
            if not accepted.set_running_or_notify_cancel():
                return  # the client went away before its turn came
            if self.error is not None:
                accepted.set_exception(RuntimeError(f"The engine stopped: {self.error!r}"))
                return
            if request.id in self._listeners:
                # Here and not by the engine: the other's listener would be lost, and nobody told of its end.
                accepted.set_exception(RequestRefused("another request with this id is not finished.", request.id))
                return
            self._listeners[request.id] = listener
            try:
                self._engine.submit(request)
            except Exception as e:
                del self._listeners[request.id]
                accepted.set_exception(e)
            else:
                accepted.set_result(None)

        self._post(do)
        return accepted

    def cancel(self, request_id: str, failure: str = "") -> None:
        """Ends a request at the next step, with the error `failure` if there is one; its listener still gets the
        completion. Unknown ids are let pass."""
        self._post(lambda: self._cancel(request_id, failure))

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread; requests in flight end as cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _cancel(self, request_id: str, failure: str) -> None:
        self._engine.cancel(request_id, failure)

    def _post(self, command: Callable[[], None]) -> None:
        with self._changed:
            if self._thread.is_alive() and not self._closing:
                self._commands.append(command)
                self._changed.notify()
                return
        # Nobody takes commands any more: `submit` must still answer.
        self.error = self.error or RuntimeError("it was closed")
        command()

    def _run(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
            while True:
                with self._changed:
                    while not (self._commands or self._closing or self._engine.has_work):
                        self._changed.wait()
                    commands, self._commands = self._commands, []
                    if self._closing:
                        break
                for command in commands:
                    command()
                if self._engine.has_work:
                    for event in self._engine.step():
                        self._tell(event)
        except BaseException as e:
            log.exception("The engine's thread died")
            self.error = e
        with self._changed:
            self._closing = True
            commands, self._commands = self._commands, []
        self.error = self.error or RuntimeError("it was closed")
        for command in commands:
            command()
        for request_id in list(self._listeners):
            lost = Completion(request_id, [], "error", RequestMetrics(), f"the engine stopped: {self.error!r}")
            self._tell(StepEvent(request_id, [], lost))

    def _tell(self, event: StepEvent) -> None:
        listener = self._listeners.get(event.request_id)
        if event.finished is not None:
            self._listeners.pop(event.request_id, None)
        if listener is None:
            return
        try:
            listener(event)
        except Exception as e:  # one listener's fault must not end the others' requests
            log.exception("The listener of request %s failed, and with it the request", event.request_id)
            self._listeners.pop(event.request_id, None)
            if event.finished is None:
                self._engine.cancel(event.request_id, f"its listener failed: {type(e).__name__}: {e}")
