"""Greedy text equals transformers' own generate, whatever drafts, batches, chunks or schedules."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from draftline_kernels import verify
from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, QueueFull, Request, StepCost, make_proposer, verification
from pipeline.decoding.attention import Segment, StepLayout
from pipeline.decoding.plan import plan_step
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.verification import Verification
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target, load_target
from tests.drafts.conftest import cache_dir, draft, tiny  # noqa: F401
from tests.drafts.samples import small_draft

PROMPTS = ["What is the sum?", "Hello", "Explain why the sky is blue in one sentence, please", "a b a b a b", "def add"]
LONG = 104


def prompt_ids(target: Target) -> list[list[int]]:
    return [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
        )
        for p in PROMPTS
    ]


@pytest.fixture(scope="module")
def expected(cache_dir: Path) -> list[list[int]]:  # noqa: F811
    """transformers' own greedy text."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    out = []
    for ids in prompt_ids(target):
        with torch.inference_mode():
            text = target.model.generate(torch.tensor([ids]), max_new_tokens=LONG, do_sample=False)
        out.append(text[0, len(ids) :].tolist())
    assert len(set(map(tuple, out))) == len(out)
    return out


KINDS = {
    "dspark": {},
    "dflash": {
        "algorithm": "dflash",
        "sample_from_anchor": False,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
    "eagle3": {
        "algorithm": "eagle3",
        "num_layers": 1,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
}


def proposer_for(target: Target, name: str, rule: str = "coupled", **changes: Any) -> Any:
    """A proposer by name, with a small random draft where it needs one (of changed settings)."""
    if name not in KINDS:
        return make_proposer(name)
    return make_proposer(name, small_draft(target, **{**KINDS[name], **changes}), rule=rule)


def engine_for(target: Target, draft: DSparkDraft, name: str, rule: str = "coupled", **settings: Any) -> Engine:  # noqa: F811
    config = EngineConfig(**{"max_requests": 3, "max_context": 512, "threads": 1, "prefill_chunk": 7, **settings})
    engine = Engine(
        target,
        config,
        step_cost=StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]]),
    )
    options = {"rule": rule} if name == "dspark" else {}
    engine.set_proposer(make_proposer(name, draft, **options))
    return engine


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("none", "global"),
        *itertools.product(("ngram", *KINDS), ("global", "fixed")),
        *itertools.product(("dspark",), ("early_stop", "asynchronous", "threshold")),
    ],
)
def test_greedy_text_is_the_targets(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
    name: str,
    scheduler: str,
) -> None:
    proposer = proposer_for(tiny, name)
    engine = engine_for(tiny, draft, "none", max_requests=5)
    engine.set_proposer(proposer)
    engine.set_schedule(scheduler)
    done = engine.generate([Request(i, max_new_tokens=LONG) for i in prompt_ids(tiny)])
    assert [d.token_ids for d in done] == expected
    assert all(d.metrics.decoded == len(d.token_ids) - 1 for d in done)
    if name == "none":
        assert all(d.metrics.tau == 1.0 for d in done)


@pytest.mark.parametrize("scheduler", ["global", "early_stop"])
def test_steps_fill_the_runners_buckets(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
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


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "dflash", "eagle3"])
def test_confidence_has_not_seen_the_token_it_is_about(tiny: Target, head: str, rule: str) -> None:  # noqa: F811
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


@pytest.mark.parametrize("settings", [{"scheduler": "fixed"}, {"skip_drafts": False}, {}])
@pytest.mark.parametrize("name", ["ngram", *KINDS])
def test_a_request_that_takes_no_draft_is_never_drafted_for(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
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
def test_a_16_bit_target_decodes_with_every_draft(cache_dir: Path, name: str, temperature: float) -> None:  # noqa: F811
    target = load_target(TargetConfig(path="tiny", dtype="bfloat16"), cache_dir)
    config = EngineConfig(max_requests=3, max_context=512, threads=1, rule="ratio", scheduler="fixed")
    engine = Engine(target, config, proposer_for(target, name, "ratio"))
    done = engine.generate(
        [Request(i, max_new_tokens=24, temperature=temperature, ignore_eos=True) for i in prompt_ids(target)]
    )
    assert [len(d.token_ids) for d in done] == [24] * len(PROMPTS)
    assert all(d.metrics.verified for d in done)


def test_a_perfect_draft_is_accepted_whole(tiny: Target, draft: DSparkDraft, expected: list[list[int]]) -> None:  # noqa: F811
    """A proposer that knows the text gets tau = K + 1: nothing right is rejected."""
    engine = engine_for(tiny, draft, "ngram")
    ids = prompt_ids(tiny)[0]
    proposer = make_proposer("ngram", block_size=4)

    def propose(sequences: list[Any]) -> Any:
        from pipeline.decoding.proposers import Proposal

        at = len(sequences[0].tokens) - len(ids)
        block = torch.tensor([(expected[0][at : at + 4] + [0] * 4)[:4]])
        return Proposal(block, torch.tensor([4]), torch.ones(1, 4))

    proposer.propose = propose  # type: ignore[method-assign]
    engine.set_proposer(proposer)
    engine.set_schedule("fixed")
    (done,) = engine.generate([Request(ids, max_new_tokens=101)])
    assert done.token_ids == expected[0][:101]
    assert done.metrics.tau == 5.0 and done.metrics.target_steps == 20


@pytest.fixture(scope="module")
def sampled(cache_dir: Path) -> list[list[int]]:  # noqa: F811
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
def test_a_seed_gives_one_text_under_the_coupled_rule(tiny: Target, sampled: list[list[int]], head: str) -> None:  # noqa: F811
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


def test_draft_context_is_the_training_forwards(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
    """The draft sees in decoding what it sees in training: its first block's tokens are the training forward's."""
    from pipeline.target import TapCapture
    from pipeline.training.attention import block_attention

    ids = prompt_ids(tiny)[2]
    with torch.inference_mode():
        with TapCapture(tiny.family, draft.config.target_layer_ids) as capture:
            logits = tiny.model(torch.tensor([ids])).logits[0, -1]
        anchor, token = len(ids), int(logits.argmax())
        kv = draft.context_kv(draft.context(capture.taps()[0]), torch.arange(len(ids)))
        hidden = draft.blocks(
            torch.tensor([token]),
            torch.tensor([anchor]),
            lambda i, q, k, v: block_attention(q, k, v, kv[i], [anchor], [1], [torch.zeros(4, anchor)], 4),
        )
        wanted, previous = [], torch.tensor([token])
        for k in range(4):
            previous = draft.d2t[
                (draft.logits(hidden[k : k + 1]) + draft.markov_step(hidden[k : k + 1], previous)[0]).argmax(-1)
            ]
            wanted.append(int(previous))
    engine = engine_for(tiny, draft, "dspark")
    engine.set_schedule("fixed")
    seen: list[list[int]] = []
    inner = engine.proposer.propose

    def watch(sequences: list[Any]) -> Any:
        proposal = inner(sequences)
        seen.append(proposal.tokens[0].tolist())
        return proposal

    engine.proposer.propose = watch  # type: ignore[method-assign]
    engine.generate([Request(ids, max_new_tokens=8)])
    assert seen[0] == wanted


def test_a_stop_token_ends_the_text_inside_a_block(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
) -> None:
    stop = expected[3][20]
    cut = expected[3].index(stop) + 1
    engine = engine_for(tiny, draft, "ngram")
    (done,) = engine.generate([Request(prompt_ids(tiny)[3], max_new_tokens=LONG, stop_ids=(stop,))])
    assert done.token_ids == expected[3][:cut] and done.finish_reason == "stop"


def test_cancelled_requests_end_and_give_their_pages_back(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
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


def test_not_finite_logits_fail_one_request_only(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
) -> None:
    engine = engine_for(tiny, draft, "none")
    good, bad = Request(prompt_ids(tiny)[0], max_new_tokens=20), Request([5, 6, 7], max_new_tokens=20)
    inner = engine.runner.step

    def poison(segments: list[Any], tokens: list[int], rows: list[int]) -> Any:
        taps, logits = inner(segments, tokens, rows)
        logits = logits.clone()
        if len(segments) == 2 and segments[1].count == 1:
            logits[-1] = float("nan")
        return taps, logits

    engine.runner.step = poison  # type: ignore[method-assign]
    done = engine.generate([good, bad])
    assert done[0].token_ids == expected[0][:20]
    assert done[1].finish_reason == "error"
    assert re.search(r"logits at position \d+ are not finite \(after \d+ tokens, step \d+\)", done[1].error or "")


@pytest.mark.parametrize("name", ["none", "dspark", "eagle3"])
def test_the_next_request_in_a_failed_one_s_pages_is_not_failed_by_what_it_left(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
    name: str,
) -> None:
    """Its keys were not finite, and the next request attends beside a longer one over the same positions."""
    ids = prompt_ids(tiny)
    engine = engine_for(tiny, draft, "none")
    engine.set_proposer(proposer_for(tiny, name))
    engine.set_schedule("fixed")  # others hold back what the draft's context would be told
    poison = tiny.family.embed_tokens.register_forward_hook(lambda _module, _given, out: out * float("nan"))
    (failed,) = engine.generate([Request([5] * 120, max_new_tokens=4)])
    poison.remove()
    assert failed.finish_reason == "error"
    inner = engine.proposer.propose

    def finite(sequences: list[Any]) -> Any:
        proposal = inner(sequences)
        assert torch.isfinite(proposal.confidence).all()
        return proposal

    engine.proposer.propose = finite  # type: ignore[method-assign]
    done = engine.generate([Request(ids[1], max_new_tokens=30), Request(ids[2], max_new_tokens=60)])
    assert [d.token_ids for d in done] == [expected[1][:30], expected[2][:60]]


def nan_at(target: Target, token: int) -> Any:
    """Makes a token's embedding NaN; returns the hook to remove."""
    return target.family.embed_tokens.register_forward_hook(
        lambda _module, given, out: out.masked_fill((given[0] == token)[..., None], float("nan"))
    )


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_a_step_s_nan_stays_with_whose_it_is(tiny: Target, draft: DSparkDraft, softcap: float) -> None:  # noqa: F811
    """On CPU two requests attend in one call, and the shorter one reads what the longer one writes in the same step."""
    runner = engine_for(tiny, draft, "dspark", page_size=4).runner
    runner.geometry = [dataclasses.replace(a, softcap=softcap) for a in runner.geometry]
    ids = [5, 6, 7, 8]
    good, bad = Segment([0], 0, 4), Segment([1, 2, 3], 0, 10)
    taps, logits = runner.step([good], ids, [0, 3])
    poison = nan_at(tiny, 9)
    try:
        with_bad = runner.step([good, bad], [*ids, 8, 8, 9, *[8] * 7], [0, 3, 4, 13])
    finally:
        poison.remove()
    assert runner.unsound == {1}
    assert taps is not None and with_bad[0] is not None
    torch.testing.assert_close(with_bad[0][:4], taps)
    torch.testing.assert_close(with_bad[1][:2], logits)
    runner.step([good, bad], [*ids, *[8] * 10], [0])
    assert not runner.unsound


@pytest.mark.parametrize("name", ["none", "dspark", "eagle3"])
def test_a_prompt_that_becomes_nan_on_the_way_fails_nobody_else(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its next chunks reach as far as its NaN when the request in the pages before it attends beside them."""
    ids = prompt_ids(tiny)[1]
    magic = max(set(range(tiny.vocab_size)).difference(ids, expected[1]))
    engine = engine_for(tiny, draft, "none", max_requests=2, max_context=128, prefill_chunk=10)
    engine.set_proposer(proposer_for(tiny, name))
    engine.set_schedule("fixed")
    pool, inner, paired = engine.runner.pool, StepLayout._pairs, 0

    def gap(count: int) -> int:
        """A page between the two for the first to grow into."""
        held = pool.refs.nonzero()[0]
        at = int(held.max()) + 2 if len(held) else 0
        assert pool._free[at : at + count].all()
        return at

    monkeypatch.setattr(pool, "_gap", gap)

    def count(self: StepLayout, *args: Any) -> Any:
        nonlocal paired
        pairs = inner(self, *args)
        paired += any(max(p.counts) == 10 for p in pairs)
        return pairs

    monkeypatch.setattr(StepLayout, "_pairs", count)
    poison = nan_at(tiny, magic)
    done: dict[str, Any] = {}
    try:
        engine.submit(Request(ids, max_new_tokens=60, id="good"))
        while not all(s.prefilled for s in engine.batch.running) or not engine.batch.running:
            engine.step()
        engine.submit(Request([*[7] * 20, magic, *[7] * 80], max_new_tokens=20, id="bad"))
        while engine.has_work:
            done |= {e.request_id: e.finished for e in engine.step() if e.finished is not None}
    finally:
        poison.remove()
    assert paired and done["bad"].finish_reason == "error"
    assert "positions 20 to 29 of its prompt are not finite" in done["bad"].error
    assert done["good"].token_ids == expected[1][:60]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", []),
        ("prompt_ids", [9999]),
        ("max_new_tokens", 0),
        ("max_new_tokens", 600),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -2),
        ("top_k", 10**19),
        ("top_k", 2.5),
        ("seed", None),
        ("seed", 1.5),
        ("max_draft", -1),
    ],
)
def test_a_bad_field_is_named_with_its_value(tiny: Target, draft: DSparkDraft, field: str, value: Any) -> None:  # noqa: F811
    engine = engine_for(tiny, draft, "none")
    with pytest.raises(DraftlineError, match=field) as refused:
        engine.submit(Request(**{"prompt_ids": [5], field: value}))
    assert str(value).strip("[]") in str(refused.value)
    assert not engine.has_work


def test_a_refused_request_leaves_none_in_the_engine(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
) -> None:
    engine = engine_for(tiny, draft, "dspark")
    ids = prompt_ids(tiny)
    with pytest.raises(DraftlineError, match="top_p"):
        engine.generate([Request(ids[0], max_new_tokens=30), Request(ids[1], top_p=2.0)])
    assert not engine.has_work

    def interrupt(event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(i, max_new_tokens=30) for i in ids], interrupt)
    assert not engine.has_work
    (done,) = engine.generate([Request(ids[1], max_new_tokens=30)])
    assert done.token_ids == expected[1][:30]


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_a_block_drawn_by_the_kernel_is_the_block_drawn_slot_by_slot(
    tiny: Target,  # noqa: F811
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


def test_an_engine_without_step_costs_measures_them(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
    config = EngineConfig(max_requests=1, max_context=128, threads=1, scheduler="early_stop")
    engine = Engine(tiny, config, make_proposer("dspark", draft))
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=8)])
    assert len(done.token_ids) == 8
    assert engine.step_cost is not None and engine.step_cost.seconds(1, 64) > 0


def test_an_engine_keeps_its_step_costs(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
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


def test_a_temperature_too_small_for_float32_is_greedy(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
    expected: list[list[int]],
) -> None:
    engine = engine_for(tiny, draft, "dspark")
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=30, temperature=1e-38)])
    assert done.token_ids == expected[0][:30]


def test_a_draft_made_for_the_other_rule_may_not_sample(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
    engine = engine_for(tiny, draft, "dspark", rule="coupled")
    engine.set_schedule("early_stop", rule="ratio")
    with pytest.raises(DraftlineError, match="draws its tokens for the coupled rule .* by the ratio rule"):
        engine.submit(Request([5], temperature=1.0))
    engine.submit(Request([5]))


def test_a_full_queue_and_an_inexact_schedule_are_refused(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
    engine = engine_for(tiny, draft, "none", max_queue=1)
    engine.submit(Request([5]))
    with pytest.raises(QueueFull, match="max_queue=1"):
        engine.submit(Request([5]))
    engine = engine_for(tiny, draft, "none")
    for _ in range(2):  # an id is free again when its request has ended, whatever ended it
        engine.submit(Request([5], max_new_tokens=1, id="mine"))
        with pytest.raises(DraftlineError, match="another request with this id is not finished"):
            engine.submit(Request([5], id="mine"))
        engine.step()
    engine.submit(Request([5], id="mine"))
    engine.cancel("mine")
    engine.step()
    engine.submit(Request([5], id="mine"))
    engine = engine_for(tiny, draft, "dspark", rule="ratio")
    engine.set_schedule("global", rule="ratio")
    with pytest.raises(DraftlineError, match="early_stop"):
        engine.submit(Request([5], temperature=1.0))
    engine.submit(Request([5]))
    with pytest.raises(ConfigError, match="Did you mean 'early_stop'"):
        engine.set_schedule("earlystop")


def test_step_costs_are_measured_as_far_as_texts_go(
    tiny: Target,  # noqa: F811
    draft: DSparkDraft,  # noqa: F811
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


def test_a_draft_s_nan_is_not_verified(tiny: Target, draft: DSparkDraft, expected: list[list[int]]) -> None:  # noqa: F811
    engine = engine_for(tiny, draft, "dspark", scheduler="global")
    inner = engine.proposer.propose

    def broken(sequences: list[Any]) -> Any:
        return dataclasses.replace(p := inner(sequences), confidence=torch.full_like(p.confidence, float("nan")))

    engine.proposer.propose = broken  # type: ignore[method-assign]
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=30)])
    assert done.token_ids == expected[0][:30] and done.metrics.verified == 0 < done.metrics.drafted
