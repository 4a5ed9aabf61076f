"""The engine's thread: requests join steps, refusals reach their caller, nothing waits for ever."""

from __future__ import annotations

import threading

import pytest

from pipeline.decoding.batch import QueueFull
from pipeline.decoding.request import Request, RequestRefused
from pipeline.serving.engine_loop import EngineLoop
from tests.serving.fakes import FakeEngine, until


def ended(events) -> str | None:
    return events[-1].finished.finish_reason if events and events[-1].finished else None


def test_events_come_in_order_until_the_completion():
    loop = EngineLoop(FakeEngine("abcdef", per_step=4))
    events = []
    loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    until(lambda: ended(events))
    assert [len(e.token_ids) for e in events] == [4, 2]
    assert loop.active == 0
    loop.close()


def test_a_refusal_is_its_callers_and_leaves_the_loop_alive():
    engine = FakeEngine("x" * 100, delay=0.01, max_queue=1)
    loop = EngineLoop(engine)
    events = []
    loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    with pytest.raises(QueueFull):
        loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    until(lambda: ended(events))
    assert loop.alive
    loop.close()


def test_an_id_in_use_is_refused_and_its_first_request_goes_on():
    engine = FakeEngine("x" * 30, delay=0.01)
    loop = EngineLoop(engine)
    first, second = [], []
    loop.submit(Request([1], max_new_tokens=200, id="mine"), first.append).result(5)
    with pytest.raises(RequestRefused, match="Request mine: another request with this id is not finished"):
        loop.submit(Request([2], max_new_tokens=200, id="mine"), second.append).result(5)
    until(lambda: ended(first) == "stop")
    assert len(engine.requests) == 1 and not second and loop.active == 0
    loop.submit(Request([2], max_new_tokens=200, id="mine"), second.append).result(5)
    until(lambda: ended(second) == "stop")
    loop.close()


def test_a_listener_that_fails_loses_only_its_own_request():
    engine = FakeEngine("x" * 30, delay=0.005)
    loop = EngineLoop(engine)
    good = []

    def bad(_event):
        raise RuntimeError("event loop is closed")

    loop.submit(Request([1], max_new_tokens=200), bad).result(5)
    loop.submit(Request([1], max_new_tokens=200), good.append).result(5)
    until(lambda: ended(good) == "stop")
    until(lambda: not engine.running)
    assert len(engine.cancelled) == 1
    assert list(engine.failures.values()) == ["its listener failed: RuntimeError: event loop is closed"]
    loop.close()


def test_a_submission_given_up_before_its_turn_never_starts():
    engine = FakeEngine("x" * 30, delay=0.2)
    loop = EngineLoop(engine)
    events = []
    loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    assert loop.submit(Request([2], max_new_tokens=200), events.append).cancel()
    until(lambda: ended(events))
    assert len(engine.requests) == 1
    assert loop.alive
    loop.close()


def test_settings_of_a_thread_are_made_in_the_engines():
    where = []
    loop = EngineLoop(FakeEngine(), lambda: where.append(threading.current_thread().name))
    loop.submit(Request([1], max_new_tokens=200), lambda _: None).result(5)
    assert where == ["draftline-engine"]
    loop.close()


@pytest.mark.parametrize("fail", [True, False])
def test_when_the_thread_ends_every_request_is_told(fail):
    engine = FakeEngine("x" * 100, delay=0.02)
    loop = EngineLoop(engine)
    events = []
    loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    if fail:
        engine.fail = ValueError("broken")
    else:
        loop.close()
    until(lambda: ended(events) == "error")
    assert not loop.alive
    with pytest.raises(RuntimeError, match="broken" if fail else "closed"):
        loop.submit(Request([1], max_new_tokens=200), events.append).result(5)
    assert threading.current_thread().is_alive()
