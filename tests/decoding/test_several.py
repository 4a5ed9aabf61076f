"""Several drafts in one engine: each request has its own, and drafts come and go while requests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, SeveralDrafts, StepCost, make_proposer
from pipeline.decoding.proposers.base import Proposal
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target, load_target
from tests.decoding.samples import KINDS, prompt_ids
from tests.drafts.samples import small_draft

LONG = 40
LAYERS = {"dspark": [0, 1], "dflash": [1, 2], "eagle3": [0, 2]}


def proposer(target: Target, name: str, rule: str = "coupled", **changes: Any) -> Any:
    if name not in KINDS:
        return make_proposer(name)
    draft = small_draft(target, **{**KINDS[name], "target_layer_ids": LAYERS[name], **changes})
    return make_proposer(name, draft, rule=rule)


def engine_of(target: Target, drafts: Any, rule: str = "coupled") -> Engine:
    config = EngineConfig(max_requests=5, max_context=512, threads=1, prefill_chunk=9, scheduler="fixed", rule=rule)
    return Engine(target, config, drafts)


def several(target: Target, rule: str = "coupled") -> SeveralDrafts:
    names = ["dspark", "dflash", "eagle3", "ngram"]
    return SeveralDrafts({n: proposer(target, n, rule) for n in names}, "dspark", target.vocab_size)


def fresh(cache: Path) -> Target:
    return load_target(TargetConfig(path="tiny"), cache)


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_request_decodes_as_with_its_draft_alone(
    cache_dir: Path,
    rule: str,
    temperature: float,
) -> None:
    names = ["dspark", "dflash", "eagle3", "ngram", None]
    prompts = prompt_ids(fresh(cache_dir))

    def ask(i: int, draft: str | None) -> Request:
        return Request(prompts[i], LONG, temperature=temperature, seed=i, id=f"r{i}", draft=draft)

    target = fresh(cache_dir)
    together = engine_of(target, several(target, rule), rule).generate([ask(i, n) for i, n in enumerate(names)])
    for i, name in enumerate(names):
        lone = fresh(cache_dir)
        (alone,) = engine_of(lone, proposer(lone, name or "dspark", rule), rule).generate([ask(i, None)])
        assert together[i].token_ids == alone.token_ids
        mine, its = together[i].metrics, alone.metrics
        assert mine.draft == (name or "dspark")
        if temperature == 0:
            assert (mine.lengths, mine.offered, mine.accepted_at) == (its.lengths, its.offered, its.accepted_at)


def test_a_draft_is_swapped_between_two_steps_and_no_text_changes(cache_dir: Path) -> None:
    def run(swap: bool) -> tuple[dict[str, Any], Engine, SeveralDrafts]:
        target = fresh(cache_dir)
        drafts = SeveralDrafts({"v1": proposer(target, "dspark")}, "v1", target.vocab_size)
        engine = engine_of(target, drafts)
        prompts = prompt_ids(target)
        done = {}
        for i in (0, 1):
            engine.submit(Request(prompts[i], LONG, temperature=0.9, seed=i, id=f"r{i}"))
        for step in range(400):
            if step == 6:
                if swap:
                    engine.change_drafts({"v2": proposer(target, "eagle3", seed=3)}, default="v2", remove=["v1"])
                for i in (2, 3, 4):
                    engine.submit(Request(prompts[i], LONG, temperature=0.9, seed=i, id=f"r{i}"))
            for event in engine.step():
                if event.finished:
                    done[event.request_id] = event.finished
            if len(done) == 5:
                return done, engine, drafts
        raise AssertionError("requests did not end")

    plain, *_ = run(swap=False)
    swapped, engine, drafts = run(swap=True)
    assert {i: c.token_ids for i, c in swapped.items()} == {i: c.token_ids for i, c in plain.items()}
    assert [swapped[f"r{i}"].metrics.draft for i in range(5)] == ["v1", "v1", "v2", "v2", "v2"]
    assert all(c.metrics.drafted for c in swapped.values())
    assert drafts.names == ["v2"] and len(drafts.resident) == 1, "the old one left with its last request"
    assert engine.runner.layer_ids == [0, 1, 2]


def test_drafts_with_blocks_of_several_sizes_are_weighed_together(cache_dir: Path) -> None:
    target = fresh(cache_dir)
    sizes = {f"b{n}": proposer(target, "dspark", block_size=n) for n in (2, 5)}
    drafts = SeveralDrafts(sizes, "b2", target.vocab_size)
    config = EngineConfig(max_requests=5, max_context=512, threads=1)
    engine = Engine(target, config, drafts, StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]]))
    for name in ("b2", "b5", None):
        done = engine.generate([Request(p, LONG, draft=name) for p in prompt_ids(target)])
        assert all(c.finish_reason in ("stop", "length") for c in done)
    texts = [engine.generate([Request(p, LONG, max_draft=0)])[0] for p in prompt_ids(target)]
    assert [c.token_ids for c in texts] == [c.token_ids for c in done]
    assert not any(c.metrics.drafted for c in texts)


def test_a_draft_that_is_to_be_weighed_waits_for_step_costs(tiny: Target) -> None:
    drafts = SeveralDrafts({"plain": make_proposer("none")}, "plain", tiny.vocab_size)
    engine = Engine(tiny, EngineConfig(max_requests=5, max_context=512, threads=1), drafts)
    engine.submit(Request(prompt_ids(tiny)[0], 8))
    engine.step()
    with pytest.raises(DraftlineError, match="call engine.profile"):
        engine.change_drafts({"ngram": make_proposer("ngram")}, default="ngram")
    while engine.has_work:
        engine.step()
    engine.change_drafts({"ngram": make_proposer("ngram")}, default="ngram")
    engine.step_cost = StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]])
    assert engine.generate([Request(prompt_ids(tiny)[0], 8)])[0].metrics.draft == "ngram"


def test_what_can_not_be_is_refused_and_changes_nothing(tiny: Target) -> None:
    drafts = several(tiny)
    engine = engine_of(tiny, drafts)
    with pytest.raises(DraftlineError, match=r"draft is 'dspurk'.*Did you mean 'dspark'"):
        engine.submit(Request([1, 2], 4, draft="dspurk"))
    for change, words in [
        ({"add": {"dspark": proposer(tiny, "ngram")}, "default": "dspark"}, "already"),
        ({"default": "dspark", "remove": ["dspark"]}, "default draft 'dspark' is not one of"),
        ({"default": "dspark", "remove": ["dflesh"]}, "Did you mean 'dflash'"),
        ({"add": {"other": proposer(tiny, "dspark", "ratio")}, "default": "other"}, "'other' draws .* the ratio rule"),
    ]:
        with pytest.raises(ConfigError, match=words):
            engine.change_drafts(**change)
    assert (drafts.names, drafts.default) == (["dspark", "dflash", "eagle3", "ngram"], "dspark")
    engine.submit(Request([1, 2], 4, draft="eagle3"))
    with pytest.raises(DraftlineError, match="name a draft to be removed: request-"):
        engine.change_drafts(default="dspark", remove=["eagle3"])
    with pytest.raises(DraftlineError, match="has one draft"):
        engine_of(tiny, proposer(tiny, "ngram")).change_drafts(default="ngram")
    with pytest.raises(DraftlineError, match="draft is 'dspark'"):
        engine_of(tiny, proposer(tiny, "ngram")).submit(Request([1, 2], 4, draft="dspark"))


def test_a_draft_made_for_the_other_rule_is_not_taken_in(tiny: Target) -> None:
    """No draft here has a rule yet, so that requests that sample may wait."""
    drafts = SeveralDrafts({"ngram": make_proposer("ngram")}, "ngram", tiny.vocab_size)
    engine = engine_of(tiny, drafts, "ratio")
    engine.submit(Request(prompt_ids(tiny)[0], 8, temperature=1.0))
    with pytest.raises(ConfigError, match="'new' draws its tokens for the coupled rule .* verifies by the ratio rule"):
        engine.change_drafts({"new": proposer(tiny, "dspark")}, default="new")
    assert drafts.names == ["ngram"]
    engine.change_drafts({"new": proposer(tiny, "dspark", "ratio")}, default="new")


def test_blocks_of_different_drafts_become_one(tiny: Target) -> None:
    """Rows in their order, draft vocabularies spread over the target's, a certain row without any mass."""
    from pipeline.decoding.proposers.several import _together

    logits = torch.randn(2, 2, 3)
    drawn = Proposal(torch.tensor([[4, 7], [7, 9]]), torch.tensor([2, 2]), torch.full((2, 2), 0.5), None, logits)
    drawn.d2t = torch.tensor([4, 7, 9])
    certain = Proposal(torch.tensor([[1, 2, 3]]), torch.tensor([1]), torch.full((1, 3), 0.25))
    out = _together([([2, 0], drawn), ([1], certain)], 3, 12)
    assert out.tokens.tolist() == [[7, 9, 0], [1, 2, 3], [4, 7, 0]]
    assert out.counts.tolist() == [2, 1, 2]
    assert out.confidence.tolist() == [[0.5, 0.5, 0.0], [0.25, 0.25, 0.25], [0.5, 0.5, 0.0]]
    assert out.logits is not None and out.d2t is None
    assert torch.equal(out.logits[2, :2, [4, 7, 9]], logits[0])
    assert torch.isneginf(out.logits[1]).all() and torch.isneginf(out.logits[0, 0, [0, 1, 2, 3, 5, 6, 8, 10, 11]]).all()
