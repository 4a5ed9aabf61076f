"""Recorded steps: replayed over other requests, they say what steps launched one operation at a time say.

No GPU is needed: a tape stands in for a CUDA graph. It notes every tensor operation that a step does, with the tensors
and numbers of that moment, and does them again, over the same tensors, when it is replayed. So whatever a step takes
from the host when it is recorded stays as it was, as it does in a graph, and comes out wrong here if it should not.
Operations that would wait for the device, or copy from the host, are refused, as a graph can't hold them. The kernels
(attention over pages, the draw of a slot) are single operations to it, done by their references.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import draftline_kernels
from draftline_kernels import Sampling
from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, StepCost, make_proposer, runner, table_layout
from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers import drawing
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.decoding.recorded import SIZES, Recorded, size_for
from pipeline.target import Target, load_target
from tests.decoding.samples import KINDS, prompt_ids, proposer_for
from tests.decoding.test_families import NEW, expected, prompts
from tests.decoding.test_worth import Oracle
from tests.drafts.samples import small_draft
from tests.target.tiny_families import ENGINE, tiny_target

WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "unique")


class _Tape(TorchDispatchMode):
    """Notes operations."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            raise RuntimeError(f"{func} would wait for the device")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, before in self.done:
            now = func(*args, **kwargs)
            for old, new in zip(tree_flatten(before)[0], tree_flatten(now)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Makes recorders: one for the target, one for every draft."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self) -> Callable[[Callable[[], Any]], Recorded[Any]]:
        outs: list[Any] = []

        def record(body: Callable[[], Any]) -> Recorded[Any]:
            tape = _Tape()
            with tape:
                out = body()
            self.made += 1
            outs.append(out)

            def replay() -> None:
                self.replayed += 1
                # Graphs of one recorder share memory: what another left is gone.
                for other in outs:
                    for lost in _tensors(other) if other is not out else []:
                        lost.fill_(float("nan") if lost.is_floating_point() else -1)
                tape.replay()

            return Recorded(out, replay)

        return record


def _tensors(out: Any) -> list[torch.Tensor]:
    parts = vars(out).values() if dataclasses.is_dataclass(out) else out
    return [t for t in parts if isinstance(t, torch.Tensor)]


@torch.library.custom_op("draftline_tests::attend", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    context: torch.Tensor,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    few: bool,
) -> torch.Tensor:
    """Attention over pages by its definition."""
    return draftline_kernels.ragged_paged_attention(
        q, k, v, table, starts, context,
        page_size=page_size, scale=scale, window=window, softcap=softcap, causal=causal,
    )  # fmt: skip


@torch.library.custom_op("draftline_tests::slot", mutates_args=())
def _slot(
    base: torch.Tensor,
    previous: torch.Tensor,
    anchors: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    min_p: torch.Tensor,
    d2t: torch.Tensor,
    vocabulary: int,
    rule: str,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot's tokens and logits by their definition."""
    block = draftline_kernels.markov_block(
        base, None, None, previous, anchors, Sampling(temperature, top_k, top_p, seed, min_p),
        vocabulary=vocabulary, d2t=d2t, rule=rule, logits=True, first=first,
    )  # fmt: skip
    assert block.logits is not None
    return block.tokens, block.logits


def _slots(
    base: torch.Tensor,
    code: Any,
    w2: Any,
    previous: torch.Tensor,
    anchors: torch.Tensor,
    sampling: Sampling,
    **options: Any,
) -> draftline_kernels.Block:
    """`markov_block`, slot by slot."""
    asked = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.min_p)
    wanted, first = options.pop("logits"), options.pop("first")
    tokens, seen, kept = [], [], []
    for k in range(base.shape[1]):
        z = base[:, k].float()
        if code is not None:
            z = z + torch.nn.functional.linear(code(k, previous).to(w2.dtype), w2).float()
        seen.append(previous)
        drawn, logits = _slot(z[:, None], previous, anchors, *asked, first=first + k, **options)
        previous = drawn[:, 0]
        tokens.append(previous)
        kept.append(logits[:, 0])
    logits = torch.stack(kept, 1) if wanted else None
    return draftline_kernels.Block(torch.stack(tokens, 1), torch.stack(seen, 1), logits)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Engines made meanwhile record their steps on tapes."""
    made = Tapes()
    init = runner.TargetRunner.__init__
    monkeypatch.setattr(runner.TargetRunner, "__init__", lambda self, *args: init(self, *args, recorder=made))
    monkeypatch.setattr(table_layout, "ragged_paged_attention", _attend)
    monkeypatch.setattr(drawing, "markov_block", _slots)
    return made


def engine_of(target: Target, proposer: Any = None, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"max_requests": 4, "max_context": 256, "threads": 1, "prefill_chunk": 16, "prepack": False, **settings}
    )
    cost = StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]])
    # Fixed costs, so that two engines choose alike.
    cost.observe = cost.observe_draft = lambda *_: None  # type: ignore[method-assign]
    return Engine(target, config, proposer, cost)


def requests(target: Target, **asked: Any) -> list[Request]:
    ids = prompt_ids(target)
    return [Request(p, max_new_tokens=20 + 5 * i, **{"seed": i, **asked}) for i, p in enumerate(ids)]


def launched(engine: Engine, proposer: Any) -> Engine:
    """The same engine, whose steps are launched operation by operation; it fills the same sizes of step."""
    engine.runner._replays = engine.runner.terms = None
    engine.set_proposer(proposer)
    return engine


def rounds_of(engine: Engine, asked: list[Request]) -> tuple[list[list[int]], list[Any]]:
    """Texts, and of each round what was drafted: lengths, accepted tokens and raw confidences."""
    rounds: list[Any] = []
    engine.on_round = rounds.append
    return [d.token_ids for d in engine.generate(asked)], rounds


def assert_same(given: tuple[list[list[int]], list[Any]], expected: tuple[list[list[int]], list[Any]]) -> None:
    assert given[0] == expected[0]
    assert len(given[1]) == len(expected[1])
    for a, b in zip(given[1], expected[1], strict=True):
        assert (a.lengths.tolist(), a.accepted.tolist()) == (b.lengths.tolist(), b.accepted.tolist())
        if a.raw_confidence is not None:
            torch.testing.assert_close(a.raw_confidence, b.raw_confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "ngram", *KINDS])
@pytest.mark.parametrize(("rule", "temperature"), [("coupled", 0.0), ("coupled", 0.9), ("ratio", 0.9)])
def test_replayed_steps_say_what_launched_ones_do(
    tiny: Target,
    tapes: Tapes,
    name: str,
    rule: str,
    temperature: float,
) -> None:
    settings = {"rule": rule, "scheduler": "early_stop" if rule == "ratio" else "global", "skip_drafts": False}
    asked = {"temperature": temperature, "top_p": 0.95}
    proposer = proposer_for(tiny, name, rule)
    if name == "dspark":  # all slots in one, as on a GPU
        proposer = make_proposer("dspark", small_draft(tiny), rule=rule, pack=False)
        proposer._fused = True  # type: ignore[attr-defined]
    engine = engine_of(tiny, proposer, **settings)
    assert engine.runner.buckets
    given = rounds_of(engine, requests(tiny, **asked))
    made = tapes.made
    assert made > 2 and tapes.replayed > 3 * made
    other = launched(engine_of(tiny, **settings), proposer_for(tiny, name, rule))
    assert_same(given, rounds_of(other, requests(tiny, **asked)))
    assert tapes.made == made


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_greedy_and_sampled_requests_share_recorded_steps(tiny: Target, tapes: Tapes, rule: str) -> None:
    """The same number of requests, of other kinds: greedy, sampled, truncated."""
    settings = {"rule": rule, "scheduler": "fixed"}
    kinds = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "presence_penalty": 0.5},
    ]
    engine = engine_of(tiny, proposer_for(tiny, "dspark", rule), **settings)
    other = launched(engine_of(tiny, **settings), proposer_for(tiny, "dspark", rule))
    ids = prompt_ids(tiny)
    for one, two in itertools.product(kinds, kinds):
        asked = [{"seed": 3, **one}, {"seed": 4, **two}]
        given, expected = (
            rounds_of(e, [Request(p, max_new_tokens=8, **how) for p, how in zip(ids, asked, strict=False)])
            for e in (engine, other)
        )
        assert_same(given, expected)


@pytest.mark.parametrize("name", ["dspark", "eagle3"])
def test_what_is_held_back_for_a_draft_outlives_the_next_replay(tiny: Target, tapes: Tapes, name: str) -> None:
    """Rounds are skipped between drafts, whose taps come from steps replayed over since."""
    settings = {"skip_drafts": True, "prefix_cache": False}
    asked = [Request(p, max_new_tokens=60, ignore_eos=True) for p in prompt_ids(tiny)[:2]]
    engine = engine_of(tiny, proposer_for(tiny, name), **settings)
    other = launched(engine_of(tiny, **settings), proposer_for(tiny, name))
    given = rounds_of(engine, asked)
    assert_same(given, rounds_of(other, asked))
    assert 2 < len(given[1]) < 30


@pytest.mark.parametrize("name", ENGINE)
def test_every_family_is_recorded(name: str, tapes: Tapes) -> None:
    target = tiny_target(name)
    engine = engine_of(target, make_proposer("dspark", small_draft(target)), max_context=128, scheduler="fixed")
    done = engine.generate([Request(ids, max_new_tokens=NEW, ignore_eos=True) for ids in prompts()])
    assert [d.token_ids for d in done] == expected(name)
    assert engine.runner.buckets and tapes.replayed > 20


def test_what_can_not_be_recorded_is_said_once_and_launched(
    tiny: Target,
    tapes: Tapes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    look = tiny.family.final_norm.register_forward_hook(lambda _m, _i, out: None if bool(out.isnan().any()) else out)
    try:
        engine = engine_of(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
        with caplog.at_level(logging.WARNING):
            given = rounds_of(engine, requests(tiny))
    finally:
        look.remove()
    said = [r.message for r in caplog.records if "can't be recorded" in r.message]
    assert len(said) == 1 and "the target (llama)" in said[0] and "would wait for the device" in said[0]
    assert engine.runner.buckets == () and tapes.made > 0  # the draft's blocks were
    other = launched(engine_of(tiny, scheduler="fixed"), proposer_for(tiny, "dspark"))
    assert_same(given, rounds_of(other, requests(tiny)))


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
    given = rounds_of(engine, requests(tiny, **asked))
    assert len(before) > 0.5 * len(proposals) and all(before)
    other = engine_of(tiny, proposer_for(tiny, name, rule), **settings)
    monkeypatch.setattr(other, "_run_ahead", lambda *_: None)
    assert_same(given, rounds_of(other, requests(tiny, **asked)))


@pytest.mark.parametrize("scheduler", ["fixed", "asynchronous"])
def test_what_is_right_is_accepted_from_a_step_that_ran_ahead(tiny: Target, tapes: Tapes, scheduler: str) -> None:
    """Of a draft that knows the text, wrong now and then: every token stands in its own place."""
    ids = prompt_ids(tiny)[:3]
    texts = [d.token_ids for d in engine_of(tiny).generate([Request(p, 60, ignore_eos=True) for p in ids])]
    draft = Oracle(texts, ids, lambda at: at % 7 != 0)
    engine = engine_of(tiny, draft, scheduler=scheduler, skip_drafts=False)
    ran = len(engine.runner._ahead)
    done = engine.generate([Request(p, 60, ignore_eos=True) for p in ids])
    assert [d.token_ids for d in done] == texts
    assert all(d.metrics.tau > 2.5 for d in done) and len(engine.runner._ahead) > ran


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


def test_drafts_are_swapped_under_recorded_steps(cache_dir: Path, tapes: Tapes) -> None:
    """Other layers are tapped, other weights draft, a draft comes back to other pages: nothing of a former recording is
    left."""
    rounds, texts = [], []
    for recorded in (True, False):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        drafts = {n: proposer_for(target, n) for n in ("dspark", "eagle3")}
        several = SeveralDrafts(drafts, "dspark", target.vocab_size)
        if recorded:
            engine = engine_of(target, several, skip_drafts=False)
        else:
            engine = launched(engine_of(target, skip_drafts=False), several)
        seen: list[Any] = []
        engine.on_round = seen.append
        asked, said = requests(target), {}
        for r in asked[:3]:
            engine.submit(r)
        for step in itertools.count():
            if step == 8:
                engine.change_drafts({}, default="eagle3", remove=["dspark"])
            if step == 9:
                changed = proposer_for(target, "dspark", target_layer_ids=[1])
                engine.change_drafts({"new": changed}, default="new", remove=["eagle3"])
                for r in asked[3:]:
                    engine.submit(r)
            said |= {e.request_id: e.finished.token_ids for e in engine.step() if e.finished}
            if not engine.has_work:
                break
        # A draft that was let go, in tensors made anew.
        engine.set_proposer(make_proposer("none"))
        engine.set_proposer(drafts["dspark"])
        again = [d.token_ids for d in engine.generate(requests(target)[:2])]
        rounds.append(seen)
        texts.append([*(said[r.id] for r in asked), *again])
    assert_same((texts[0], rounds[0]), (texts[1], rounds[1]))


def test_the_scratch_page_is_nobodys() -> None:
    pool = PagePool(4, 16, scratch=True)
    assert (pool.total, pool.available, sorted(pool.take(4))) == (5, 4, [0, 1, 2, 3])


def test_a_step_that_is_too_large_is_launched(tiny: Target, tapes: Tapes) -> None:
    engine = engine_of(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    engine.runner.buckets = (1, 2)
    given = rounds_of(engine, requests(tiny))
    assert set(engine.runner._inputs) <= {1, 2}
    other = launched(engine_of(tiny, scheduler="fixed"), proposer_for(tiny, "dspark"))
    assert_same(given, rounds_of(other, requests(tiny)))
    assert [size_for(n, SIZES) for n in (1, 9, 256, 257)] == [1, 12, 256, None]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["none", *KINDS])
@pytest.mark.parametrize(("rule", "temperature"), [("coupled", 0.0), ("coupled", 0.9), ("ratio", 0.9)])
def test_cuda_graphs_say_what_launched_steps_do(name: str, rule: str, temperature: float, cache_dir: Path) -> None:
    """The same on a device, with its kernels, in CUDA graphs."""
    settings = {"rule": rule, "scheduler": "early_stop" if rule == "ratio" else "global", "skip_drafts": False}
    given = []
    for graphs in (True, False):
        target = load_target(TargetConfig(path="tiny", device="cuda"), cache_dir)
        engine = engine_of(target, proposer_for(target, name, rule), cuda_graphs=graphs, **settings)
        assert bool(engine.runner.buckets) == graphs
        engine.runner.buckets = engine.runner.buckets or SIZES[:14]  # the same schedule
        given.append(rounds_of(engine, requests(target, temperature=temperature, top_p=0.95)))
        assert not graphs or engine.runner.buckets, "what can't be recorded takes the sizes away"
    assert_same(*given)
