"""Steps: whom they draft for, how full they are and what they cost; and requests that leave on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftline_kernels import verify
from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, make_proposer, verification
from pipeline.decoding.plan import plan_step
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.verification import Verification
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target, load_target
from tests.decoding.samples import KINDS, PROMPTS, engine_for, prompt_ids, proposer_for


@pytest.mark.parametrize("scheduler", ["global", "early_stop"])
def test_steps_fill_the_runners_buckets(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
    scheduler: str,
) -> None:
    # Requests that are not drafted for have nothing to fill a bucket with.
    engine = engine_for(tiny, draft, "dspark", scheduler=scheduler, skip_drafts=False)
    sizes: list[int] = []
    inner = engine.runner.step

    def step(segments: Any, token_ids: list[int], rows: list[int]) -> Any:
        room = len(engine.batch.running) + sum(min(4, s.draft_limit) for s in engine.batch.running)
        if room >= 9 and all(s.prefilled for s in engine.batch.running):
            sizes.append(len(token_ids))
        return inner(segments, token_ids, rows)

    engine.runner.step = step  # type: ignore[method-assign]
    engine.runner.buckets = (4, 9)
    done = engine.generate([Request(i, max_new_tokens=40) for i in prompt_ids(tiny)[:3]])
    assert [d.token_ids for d in done] == [e[:40] for e in expected[:3]]
    assert 9 in sizes and not {1, 2, 3, 5, 6, 7, 8} & set(sizes)


@pytest.mark.parametrize("settings", [{"scheduler": "fixed"}, {"skip_drafts": False}, {}])
@pytest.mark.parametrize("name", ["ngram", *KINDS])
def test_a_request_that_takes_no_draft_is_never_drafted_for(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
    name: str,
    settings: dict[str, Any],
) -> None:
    proposer = proposer_for(tiny, name)
    engine = engine_for(tiny, draft, "none", **settings)
    engine.set_proposer(proposer)
    asked: list[str] = []
    inner = proposer.propose

    def watch(sequences: list[Any]) -> Any:
        asked.extend(s.request.id for s in sequences)
        return inner(sequences)

    proposer.propose = watch
    limits = [0, 1, 0, None, 2]
    prompts = prompt_ids(tiny)
    done = engine.generate(
        [Request(p, 40, max_draft=n, id=f"{i}") for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    )
    assert [d.token_ids for d in done] == [e[:40] for e in expected]
    for completion, limit in zip(done, limits, strict=True):
        metrics = completion.metrics
        assert max(metrics.lengths) <= (99 if limit is None else limit)
        if limit == 0:
            assert completion.request_id not in asked
            assert (metrics.drafted, metrics.tau) == (0, 1.0)
    assert asked


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", KINDS)
def test_a_16_bit_target_decodes_with_every_draft(cache_dir: Path, name: str, temperature: float) -> None:
    target = load_target(TargetConfig(path="tiny", dtype="bfloat16"), cache_dir)
    config = EngineConfig(max_requests=3, max_context=512, threads=1, rule="ratio", scheduler="fixed")
    engine = Engine(target, config, proposer_for(target, name, "ratio"))
    done = engine.generate(
        [Request(i, max_new_tokens=24, temperature=temperature, ignore_eos=True) for i in prompt_ids(target)]
    )
    assert [len(d.token_ids) for d in done] == [24] * len(PROMPTS)
    assert all(d.metrics.verified for d in done)


def test_cancelled_requests_end_and_give_their_pages_back(tiny: Target, draft: DSparkDraft) -> None:
    engine = engine_for(tiny, draft, "dspark")
    requests = [Request(i, max_new_tokens=100) for i in prompt_ids(tiny)]
    for r in requests:
        engine.submit(r)
    for _ in range(8):
        engine.step()
    assert engine.cancel(requests[0].id) and engine.cancel(requests[4].id) and not engine.cancel("nobody")
    finished = {}
    while engine.has_work:
        finished |= {e.request_id: e.finished for e in engine.step() if e.finished}
    assert finished[requests[0].id].finish_reason == "cancelled"
    assert finished[requests[4].id].token_ids == []
    pool = engine.runner.pool
    assert pool.available == pool.pages and not pool.refs.any()


def test_an_engine_without_step_costs_measures_them(tiny: Target, draft: DSparkDraft) -> None:
    config = EngineConfig(max_requests=1, max_context=128, threads=1, scheduler="early_stop")
    engine = Engine(tiny, config, make_proposer("dspark", draft))
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=8)])
    assert len(done.token_ids) == 8
    assert engine.step_cost is not None and engine.step_cost.seconds(1, 64) > 0


def test_an_engine_keeps_its_step_costs(
    tiny: Target,
    draft: DSparkDraft,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "costs.json"
    config = EngineConfig(max_requests=1, max_context=128, threads=1, step_cost=str(path))
    first = Engine(tiny, config, make_proposer("dspark", draft)).profile()
    second = Engine(tiny, config, make_proposer("dspark", draft))
    monkeypatch.setattr(second.runner, "time_step", lambda *_: pytest.fail("it was measured again"))
    assert second.profile() == first
    made_for = json.loads(path.read_text())["made_for"]
    assert made_for["target"] == tiny.identity.id and made_for["dtype"] == "float32" and made_for["threads"] == 1


def test_step_costs_are_measured_as_far_as_texts_go(
    tiny: Target,
    draft: DSparkDraft,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = engine_for(tiny, draft, "none").runner
    monkeypatch.setattr(runner, "time_step", lambda tokens, context, _: 1.0 + 1e-3 * tokens * context)
    far = {5: [1], 80: [64, 72], 1024: [64, 512, 1016], 4096: [64, 512, 2048, 4088]}
    for most, contexts in far.items():
        cost = runner.step_cost(8, EngineConfig(max_requests=2, max_context=most))
        assert cost.contexts == contexts
        assert cost.seconds(8, contexts[-1]) == pytest.approx(1.0 + 8e-3 * contexts[-1])


@pytest.mark.parametrize("plain", [0, 1])
def test_the_draft_s_logits_are_copied_only_where_some_were_not_drafted_for(
    plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    requests = [Request([1, 2], temperature=1.0, seed=i) for i in range(2 + plain)]
    sequences = [Sequence(r, frozenset(), [1, 2, 3]) for r in requests]
    q = torch.randn(2, 4, 50, generator=g)
    proposal = Proposal(q.argmax(-1), torch.tensor([4, 4]), torch.full((2, 4), 0.5), logits=q)
    lengths, logits = [4, 2, *[0] * plain], torch.randn(8 + plain, 50, generator=g)
    given: list[torch.Tensor] = []

    def watch(*args: Any, draft_logits: torch.Tensor, **rest: Any) -> Any:
        given.append(draft_logits)
        return verify(*args, draft_logits=draft_logits, **rest)

    monkeypatch.setattr(verification, "verify", watch)
    plan = plan_step(sequences, [], proposal, lengths, 0)
    result = Verification(plan, logits.clone(), "ratio").result
    assert (given[0] is q) == (plain == 0)
    plan.proposal = dataclasses.replace(proposal, logits=q.double())  # not float32: copied as all were before
    again = Verification(plan, logits.clone(), "ratio").result
    assert given[1] is not q and torch.equal(given[1], given[0])
    assert torch.equal(again.accepted, result.accepted) and torch.equal(again.next_token, result.next_token)
