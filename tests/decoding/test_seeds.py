"""A seed gives one sampled text, whoever runs beside it and whatever drafts and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, make_proposer
from pipeline.target import Target, load_target
from tests.decoding.samples import KINDS, engine_for, prompt_ids, proposer_for
from tests.drafts.samples import small_draft


@pytest.fixture(scope="module")
def sampled(cache_dir: Path) -> list[list[int]]:
    """Texts of `asked`, each decoded alone and plainly."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    engine = engine_for(target, None, "none")  # type: ignore[arg-type]
    texts = [engine.generate([r])[0].token_ids for r in asked(target)]
    assert len(set(map(tuple, texts))) == len(texts)
    return texts


def asked(target: Target) -> list[Request]:
    """Requests of every sampler."""
    samplers: list[dict[str, Any]] = [
        {"temperature": 0.9, "top_p": 0.95, "top_k": 100},
        {"temperature": 1.0},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.4},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.8, "top_p": 0.8, "logit_bias": {70: 2.0}},
    ]
    return [Request(p, max_new_tokens=30, seed=11, **s) for p, s in zip(prompt_ids(target), samplers, strict=True)]


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("none", "ngram", *KINDS)},
    "gated": ("dspark", {"markov_head_type": "gated"}),
    "rnn": ("dspark", {"markov_head_type": "rnn"}),
    "dflash from the anchor": ("dflash", {"sample_from_anchor": True}),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_seed_gives_one_text_under_the_coupled_rule(tiny: Target, sampled: list[list[int]], head: str) -> None:
    """Alone or batched, plain or drafted, by whatever schedule, in short blocks or long ones: the same sampled text."""
    name, changes = HEADS[head]
    short, long = ({}, {}) if name in ("none", "ngram") else ({"block_size": 2}, {"block_size": 7})
    schedulers = ("global", "early_stop", "asynchronous", "threshold", "fixed")
    ways = [(scheduler, changes) for scheduler in (schedulers if head == name else schedulers[:2])]
    ways += [("fixed", {**changes, **short}), ("global", {**changes, **long})]
    ways = ways[:1] if name == "none" else ways
    made = [proposer_for(tiny, name, **settings) for _, settings in ways]
    engine = engine_for(tiny, None, "none")  # type: ignore[arg-type]
    verified = 0
    for (scheduler, settings), proposer in zip(ways, made, strict=True):
        engine.set_proposer(proposer)
        engine.set_schedule(scheduler)
        done = engine.generate(asked(tiny))
        assert [c.token_ids for c in done] == sampled, (scheduler, settings)
        verified += sum(c.metrics.verified for c in done)
    assert (verified > 0) == (name != "none")


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_a_block_drawn_by_the_kernel_is_the_block_drawn_slot_by_slot(
    tiny: Target,
    rule: str,
    head: str,
) -> None:
    """CUDA's path through `markov_block`, here by its reference."""
    texts = []
    for fused in (False, True):
        made = make_proposer("dspark", small_draft(tiny, markov_head_type=head), rule=rule, pack=False)
        made._fused = fused  # type: ignore[attr-defined]
        engine = engine_for(tiny, None, "none", rule=rule, scheduler="fixed")  # type: ignore[arg-type]
        engine.set_proposer(made)
        engine.set_schedule("fixed", rule=rule)
        asked = [
            Request(p, max_new_tokens=20, temperature=t, seed=i, ignore_eos=True, id=f"{i}/{t}")
            for i, p in enumerate(prompt_ids(tiny))
            for t in (0.0, 0.9)
        ]
        done = engine.generate(asked)
        texts.append([(c.token_ids, c.metrics.accepted, c.metrics.lengths) for c in done])
    assert texts[0] == texts[1]
    assert sum(accepted for _, accepted, _ in texts[0]) > 0


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "dflash", "eagle3"])
def test_confidence_has_not_seen_the_token_it_is_about(tiny: Target, head: str, rule: str) -> None:
    """Blocks of many seeds that begin alike have the same confidences up to the first token that differs, included.

    Causal schedules rest on this: were c[k] to see token k, admitting by it would pick among tokens.
    """
    kind = KINDS.get(head, {"markov_head_type": head})
    proposer = make_proposer(kind.get("algorithm", "dspark"), small_draft(tiny, **kind), rule=rule, pack=False)
    engine = Engine(tiny, EngineConfig(max_requests=1, max_context=64, threads=1, rule=rule, scheduler="fixed"))
    engine.set_proposer(proposer)
    engine.submit(Request(prompt_ids(tiny)[1], max_new_tokens=20, temperature=2.0))
    engine.step()
    (sequence,) = engine.batch.running
    engine.batch.reserve()
    known: dict[tuple[int, ...], float] = {}
    for seed in range(60):
        sequence.request.seed = seed
        proposal = proposer.propose([sequence])
        tokens = tuple(proposal.tokens[0].tolist())
        for k in range(len(tokens)):
            c = float(proposal.confidence[0, k])
            assert known.setdefault(tokens[:k], c) == pytest.approx(c, abs=1e-6)
    assert len({t for t in known if len(t) == 1}) > 5, "the blocks differ"
