"""Where a schedule foresees how much it verifies, the target runs before the host has seen what was drafted."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.target import Target
from tests.decoding.samples import KINDS, prompt_ids, proposer_for
from tests.decoding.tape import Tapes, assert_same, launched, requests, rounds_of, steady_engine
from tests.decoding.test_worth import Oracle


@pytest.mark.parametrize(("rule", "scheduler"), [("coupled", "fixed"), ("ratio", "asynchronous")])
@pytest.mark.parametrize("name", KINDS)
def test_steps_that_run_ahead_say_what_others_do(
    tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch, name: str, rule: str, scheduler: str
) -> None:
    """Texts, rounds and log-probabilities."""
    settings = {"rule": rule, "scheduler": scheduler, "skip_drafts": False}
    asked = {"temperature": 0.9, "top_p": 0.95, "logprobs": 2}
    engine = steady_engine(tiny, proposer_for(tiny, name, rule), **settings)
    before: list[bool] = []
    inner = engine.runner.step_ahead

    def watch(*args: Any) -> Any:
        unread, done = "on_host" not in vars(proposals[-1]), inner(*args)
        before.append(unread and done is not None)
        return done

    proposals: list[Any] = []
    propose = engine.proposer.propose
    monkeypatch.setattr(engine.proposer, "propose", lambda s: proposals.append(propose(s)) or proposals[-1])
    monkeypatch.setattr(engine.runner, "step_ahead", watch)
    done: list[list[Any]] = []
    for one in (engine, other := steady_engine(tiny, proposer_for(tiny, name, rule), **settings)):
        generate = one.generate
        keep = lambda r, generate=generate: done.append(generate(r)) or done[-1]  # noqa: E731
        monkeypatch.setattr(one, "generate", keep)
    given = rounds_of(engine, requests(tiny, **asked))
    assert len(before) > 0.5 * len(proposals) and all(before)
    monkeypatch.setattr(other, "_run_ahead", lambda *_: None)
    assert_same(given, rounds_of(other, requests(tiny, **asked)))
    for one, two in zip(*done, strict=True):
        said = [torch.tensor([(t.token_id, t.logprob) for t in d.logprobs]) for d in (one, two)]
        torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["fixed", "asynchronous"])
def test_what_is_right_is_accepted_from_a_step_that_ran_ahead(tiny: Target, tapes: Tapes, scheduler: str) -> None:
    """Of a draft that knows the text, wrong now and then: every token stands in its own place."""
    ids = prompt_ids(tiny)[:3]
    texts = [d.token_ids for d in steady_engine(tiny).generate([Request(p, 60, ignore_eos=True) for p in ids])]
    draft = Oracle(texts, ids, lambda at: at % 7 != 0)
    engine = steady_engine(tiny, draft, scheduler=scheduler, skip_drafts=False)
    done = engine.generate([Request(p, 60, ignore_eos=True) for p in ids])
    assert [d.token_ids for d in done] == texts
    assert all(d.metrics.tau > 2.5 for d in done) and _recorded(engine)


def test_what_runs_ahead_and_what_can_not(tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties count on the host what was proposed; prompts are read by steps that are not recorded."""
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    ran: list[int] = []
    inner = engine.runner.step_ahead
    monkeypatch.setattr(
        engine.runner, "step_ahead", lambda s, *r: (done := inner(s, *r)) and (ran.append(len(s)) or done)
    )
    ids = prompt_ids(tiny)
    plain = steady_engine(tiny).generate([Request(p, 12) for p in ids[:2]])
    assert [d.token_ids for d in engine.generate([Request(p, 12) for p in ids[:2]])] == [d.token_ids for d in plain]
    assert ran and max(ran) == 2
    ran.clear()
    engine.generate([Request(ids[0], 12, presence_penalty=0.5), Request(ids[1], 12)])
    assert not ran or max(ran) == 1, "not while one with a penalty decodes"
    # One that is not drafted for goes along.
    ran.clear()
    done = engine.generate([Request(ids[0], 12, max_draft=0), Request(ids[1], 12)])
    assert [d.token_ids for d in done] == [d.token_ids for d in plain] and max(ran) == 2


def _recorded(engine: Engine) -> bool:
    """Whether steps ran ahead: what can't be recorded would be run otherwise."""
    replays = engine.runner._ahead_replays
    return replays is not None and replays.possible and len(replays._recorded) > 0


def test_requests_come_and_go_while_steps_run_ahead(tiny: Target, tapes: Tapes) -> None:
    """Several drafts with blocks of different lengths, cancelled and preempted requests, one that joins."""
    plain = [
        d.token_ids for d in steady_engine(tiny).generate([Request(p, 40, ignore_eos=True) for p in prompt_ids(tiny)])
    ]
    drafts = {n: proposer_for(tiny, n, block_size=k) for n, k in (("dspark", 3), ("dflash", 5))}
    several = SeveralDrafts(drafts, "dspark", tiny.vocab_size)
    engine = steady_engine(tiny, several, scheduler="fixed", skip_drafts=False, kv_gib=3e-4, prefix_cache=False)
    asked = [Request(p, 40, ignore_eos=True, draft=("dspark", "dflash")[i % 2]) for i, p in enumerate(prompt_ids(tiny))]
    said: dict[str, list[int]] = {}
    gone = Request(prompt_ids(tiny)[0], 40, ignore_eos=True)
    for r in (gone, *asked[:4]):
        engine.submit(r)
    preempted, joined = 0, False
    for step in itertools.count():
        if step == 6:
            assert engine.cancel(gone.id)
        for e in engine.step():
            if e.finished:
                said[e.request_id] = e.finished.token_ids
                preempted += e.finished.metrics.preempted
        if len(said) > 1 and not joined:
            engine.submit(asked[4])
            joined = True
        if not engine.has_work:
            break
    assert preempted > 0 and _recorded(engine)
    assert [said[r.id] for r in asked] == plain
    assert 0 < len(said[gone.id]) < 40 and said[gone.id] == plain[0][: len(said[gone.id])]
    assert engine.runner.pool.available == engine.runner.pool.pages


def test_they_are_recorded_before_the_first_request(tiny: Target, tapes: Tapes) -> None:
    """Where step costs are weighed, and so measured; blocks are when they are first drafted."""
    config = EngineConfig(max_requests=3, max_context=128, threads=1, rule="ratio", scheduler="asynchronous")
    drafts = proposer_for(tiny, "dspark", "ratio")
    engine = Engine(tiny, config, drafts)
    engine.profile()
    replays = (engine.runner._replays, engine.runner._ahead_replays)
    before = [set(r._recorded) for r in replays if r is not None]
    most = engine.runner.run_as(config.max_requests * (drafts.block_size + 1))
    assert before[0] == set(engine.runner.buckets)
    assert before[1] == {(b, drafts.block_size) for b in before[0] if b <= most}
    asked = [Request(p, 30, ignore_eos=True) for p in prompt_ids(tiny)]
    done = engine.generate(asked)
    assert [set(r._recorded) for r in replays if r is not None] == before
    assert [d.token_ids for d in done] == [d.token_ids for d in steady_engine(tiny).generate(asked)]


def test_they_are_recorded_for_the_blocks_of_every_draft_and_only_where_they_could_run(
    tiny: Target, tapes: Tapes
) -> None:
    def recorded(proposer: Any, fails: bool = False) -> tuple[set[Any], Engine]:
        config = EngineConfig(max_requests=3, max_context=128, threads=1, rule="coupled", scheduler="asynchronous")
        engine = Engine(tiny, config, proposer)
        ahead = engine.runner._ahead_replays
        assert ahead is not None
        ahead.possible = not fails
        engine.profile()
        return set(ahead._recorded), engine

    drafts = {n: proposer_for(tiny, n, block_size=k) for n, k in (("dspark", 3), ("dflash", 5))}
    several = SeveralDrafts({**drafts, "ngram": proposer_for(tiny, "ngram")}, "dspark", tiny.vocab_size)
    found, engine = recorded(several)
    blocks = {d.block_size for d in (*drafts.values(), proposer_for(tiny, "ngram"))}
    assert len(blocks) == 3, "a step of several has blocks as long as the longest"
    assert found == {(b, k) for b in engine.runner.buckets for k in blocks if b <= engine.runner.run_as(3 * (k + 1))}
    for nothing in (recorded(proposer_for(tiny, "ngram")), recorded(proposer_for(tiny, "dspark"), fails=True)):
        assert not nothing[0] and not nothing[1].runner._ahead, "no room is made for what does not run"


def test_sizes_that_find_no_memory_take_what_ran_ahead_with_them(
    tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That some can't be recorded is said, and that none can is said again."""
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed", skip_drafts=False)
    engine.generate([Request(prompt_ids(tiny)[0], 8)])
    replays, ahead = engine.runner._replays, engine.runner._ahead_replays
    assert replays is not None and ahead is not None and ahead._recorded
    error: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    def fails(body: Any) -> Any:
        raise error[0]

    monkeypatch.setattr(replays, "_record", fails)
    size = next(b for b in engine.runner.buckets if b not in replays._recorded)
    with caplog.at_level(logging.WARNING):
        engine.runner.time_step(size, 8, 8)
        assert 0 < max(engine.runner.buckets, default=0) < size or size == 1
        assert not ahead._recorded and not engine.runner._ahead
        engine.runner.buckets, error[0] = (*engine.runner.buckets, size + 1), RuntimeError("no")
        engine.runner.time_step(size + 1, 8, 8)
    said = [r.message.split(" of ")[0] for r in caplog.records if "recorded" in r.message]
    assert said == ["Some steps", "The steps"] and not engine.runner.buckets


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_where_they_can_not_be_recorded_the_others_still_are(
    tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    sizes, ahead = engine.runner.buckets, engine.runner._ahead_replays
    assert ahead is not None

    def fails(body: Any) -> Any:
        raise error

    monkeypatch.setattr(ahead, "_record", fails)
    with caplog.at_level(logging.WARNING):
        given = rounds_of(engine, requests(tiny))
    assert engine.runner.buckets == sizes and engine.runner._replays is not None and engine.runner._replays._recorded
    assert [r.message for r in caplog.records if "recorded" in r.message] == [
        f"{'Some steps' if isinstance(error, torch.OutOfMemoryError) else 'The steps'} of the target (llama) that run "
        f"ahead can't be recorded in CUDA graphs ({error}): they wait for the host to read what was drafted."
    ]
    assert_same(given, rounds_of(launched(steady_engine(tiny, scheduler="fixed"), proposer_for(tiny, "dspark")),
                                 requests(tiny)))  # fmt: skip
