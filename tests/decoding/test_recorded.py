"""Recorded steps: replayed over other requests, they say what steps launched one operation at a time say.

No GPU is needed: a tape stands in for a CUDA graph. It notes every tensor operation that a step does, with the tensors
and numbers of that moment, and does them again, over the same tensors, when it is replayed. So whatever a step takes
from the host when it is recorded stays as it was, as it does in a graph, and comes out wrong here if it should not.
Operations that would wait for the device, or copy from the host, are refused, as a graph can't hold them. The kernels
(attention over pages, the draw of a slot) are single operations to it, done by their references.
"""

from __future__ import annotations

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
from tests.drafts.samples import small_draft
from tests.target.tiny_families import ENGINE, tiny_target

WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "unique", "_to_copy_host")


class _Tape(TorchDispatchMode):
    """Notes operations; `inside` is set while a kernel's reference runs, which is one operation by itself."""

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
    """A Recorder."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, body: Callable[[], Any]) -> Recorded[Any]:
        tape = _Tape()
        with tape:
            out = body()
        self.made += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return Recorded(out, replay)


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


def _slots(base: torch.Tensor, code: None, w2: None, previous: torch.Tensor, anchors: torch.Tensor, sampling: Sampling,
           **options: Any) -> draftline_kernels.Block:  # fmt: skip
    asked = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.min_p)
    wanted = options.pop("logits")
    tokens, logits = _slot(base, previous, anchors, *asked, **options)
    return draftline_kernels.Block(tokens, tokens, logits if wanted else None)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Engines made meanwhile record their steps on tapes."""
    made = Tapes()
    init = runner.TargetRunner.__init__
    monkeypatch.setattr(runner.TargetRunner, "__init__", lambda self, *args: init(self, *args, record=made))
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
    engine.runner._replays = engine.runner.recording = None
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
    engine = engine_of(tiny, proposer_for(tiny, name, rule), **settings)
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


def test_drafts_are_swapped_under_recorded_steps(cache_dir: Path, tapes: Tapes) -> None:
    """Other layers are tapped, other weights draft, and the former draft's tensors are let go."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    drafts = {n: proposer_for(target, n) for n in ("dspark", "eagle3")}
    engine = engine_of(target, SeveralDrafts(drafts, "dspark", target.vocab_size), skip_drafts=False)
    asked = requests(target)
    texts: dict[str, list[int]] = {}
    for r in asked[:3]:
        engine.submit(r)
    for step in itertools.count():
        if step == 8:
            changed = proposer_for(target, "dspark", target_layer_ids=[1])
            engine.change_drafts({"new": changed}, default="new", remove=["dspark", "eagle3"])
            for r in asked[3:]:
                engine.submit(r)
        texts |= {e.request_id: e.finished.token_ids for e in engine.step() if e.finished}
        if not engine.has_work:
            break
    plain = engine_of(load_target(TargetConfig(path="tiny"), cache_dir)).generate(requests(target))
    assert [texts[r.id] for r in asked] == [d.token_ids for d in plain]


def test_the_scratch_page_is_nobodys() -> None:
    pool = PagePool(4, 16, scratch=True)
    assert (pool.total, pool.available, sorted(pool.take(4))) == (5, 4, [0, 1, 2, 3])


def test_a_step_that_is_too_large_is_launched(tiny: Target, tapes: Tapes) -> None:
    engine = engine_of(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    engine.runner.buckets = (1, 2)
    given = rounds_of(engine, requests(tiny))
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
