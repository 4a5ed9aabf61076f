"""Where a schedule foresees how much it verifies, the target runs before the host has seen what was drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.decoding import Request
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.target import Target
from tests.decoding.samples import KINDS, prompt_ids, proposer_for
from tests.decoding.tape import Tapes, assert_same, engine_of, requests, rounds_of
from tests.decoding.test_worth import Oracle


@pytest.mark.parametrize(("rule", "scheduler"), [("coupled", "fixed"), ("ratio", "asynchronous")])
@pytest.mark.parametrize("name", KINDS)
def test_steps_that_run_ahead_say_what_others_do(
    tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch, name: str, rule: str, scheduler: str
) -> None:
    """Where a schedule foresees how much it verifies, the target runs before the host has seen what was drafted."""
    settings = {"rule": rule, "scheduler": scheduler, "skip_drafts": False}
    asked = {"temperature": 0.9, "top_p": 0.95, "logprobs": 2}
    engine = engine_of(tiny, proposer_for(tiny, name, rule), **settings)
    before: list[bool] = []
    inner = engine.runner.step_ahead

    def watch(*args: Any) -> Any:
        before.append("on_host" not in vars(proposals[-1]))
        return inner(*args)

    proposals: list[Any] = []
    propose = engine.proposer.propose
    monkeypatch.setattr(engine.proposer, "propose", lambda s: proposals.append(propose(s)) or proposals[-1])
    monkeypatch.setattr(engine.runner, "step_ahead", watch)
    done: list[list[Any]] = []
    for one in (engine, other := engine_of(tiny, proposer_for(tiny, name, rule), **settings)):
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
    texts = [d.token_ids for d in engine_of(tiny).generate([Request(p, 60, ignore_eos=True) for p in ids])]
    draft = Oracle(texts, ids, lambda at: at % 7 != 0)
    engine = engine_of(tiny, draft, scheduler=scheduler, skip_drafts=False)
    done = engine.generate([Request(p, 60, ignore_eos=True) for p in ids])
    assert [d.token_ids for d in done] == texts
    assert all(d.metrics.tau > 2.5 for d in done) and engine.runner._ahead


def test_what_runs_ahead_and_what_can_not(tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties count on the host what was proposed; prompts are read by steps that are not recorded."""
    engine = engine_of(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    ran: list[int] = []
    inner = engine.runner.step_ahead
    monkeypatch.setattr(engine.runner, "step_ahead", lambda s, *rest: ran.append(len(s)) or inner(s, *rest))
    ids = prompt_ids(tiny)
    plain = engine_of(tiny).generate([Request(p, 12) for p in ids[:2]])
    assert [d.token_ids for d in engine.generate([Request(p, 12) for p in ids[:2]])] == [d.token_ids for d in plain]
    assert ran and max(ran) == 2
    ran.clear()
    engine.generate([Request(ids[0], 12, presence_penalty=0.5), Request(ids[1], 12)])
    assert not ran or max(ran) == 1, "not while one with a penalty decodes"
    # One that is not drafted for goes along.
    ran.clear()
    done = engine.generate([Request(ids[0], 12, max_draft=0), Request(ids[1], 12)])
    assert [d.token_ids for d in done] == [d.token_ids for d in plain] and max(ran) == 2


def test_requests_come_and_go_while_steps_run_ahead(tiny: Target, tapes: Tapes) -> None:
    """Several drafts with blocks of different lengths, cancelled and preempted requests, one that joins."""
    plain = [d.token_ids for d in engine_of(tiny).generate([Request(p, 40, ignore_eos=True) for p in prompt_ids(tiny)])]
    drafts = {n: proposer_for(tiny, n, block_size=k) for n, k in (("dspark", 3), ("dflash", 5))}
    several = SeveralDrafts(drafts, "dspark", tiny.vocab_size)
    engine = engine_of(tiny, several, scheduler="fixed", skip_drafts=False, kv_gib=3e-4, prefix_cache=False)
    asked = [Request(p, 40, ignore_eos=True, draft=("dspark", "dflash")[i % 2]) for i, p in enumerate(prompt_ids(tiny))]
    said: dict[str, list[int]] = {}
    for r in asked[:4]:
        engine.submit(r)
    preempted, joined = 0, False
    while engine.has_work:
        for e in engine.step():
            if e.finished:
                said[e.request_id] = e.finished.token_ids
                preempted += e.finished.metrics.preempted
        if said and not joined:
            engine.submit(asked[4])
            joined = True
    assert preempted > 0 and engine.runner._ahead
    assert [said[r.id] for r in asked] == plain
    assert engine.runner.pool.available == engine.runner.pool.pages
