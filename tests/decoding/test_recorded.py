"""Recorded steps: replayed over other requests, they say what steps launched one operation at a time say. Without a GPU
on a tape (tests/decoding/tape.py)."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import TargetConfig
from pipeline.decoding import Request, make_proposer
from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.decoding.recorded import SIZES, size_for
from pipeline.target import Target, load_target
from tests.decoding.samples import KINDS, prompt_ids, proposer_for
from tests.decoding.tape import Tapes, assert_same, launched, requests, rounds_of, steady_engine
from tests.decoding.test_families import NEW, expected, prompts
from tests.drafts.samples import small_draft
from tests.target.tiny_families import ENGINE, tiny_target


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
    engine = steady_engine(tiny, proposer, **settings)
    assert engine.runner.buckets
    given = rounds_of(engine, requests(tiny, **asked))
    made = tapes.made
    assert made > 2 and tapes.replayed > 3 * made
    other = launched(steady_engine(tiny, **settings), proposer_for(tiny, name, rule))
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
    engine = steady_engine(tiny, proposer_for(tiny, "dspark", rule), **settings)
    other = launched(steady_engine(tiny, **settings), proposer_for(tiny, "dspark", rule))
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
    engine = steady_engine(tiny, proposer_for(tiny, name), **settings)
    other = launched(steady_engine(tiny, **settings), proposer_for(tiny, name))
    given = rounds_of(engine, asked)
    assert_same(given, rounds_of(other, asked))
    assert 2 < len(given[1]) < 30


@pytest.mark.parametrize("name", ENGINE)
def test_every_family_is_recorded(name: str, tapes: Tapes) -> None:
    target = tiny_target(name)
    engine = steady_engine(target, make_proposer("dspark", small_draft(target)), max_context=128, scheduler="fixed")
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
        engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
        with caplog.at_level(logging.WARNING):
            given = rounds_of(engine, requests(tiny))
    finally:
        look.remove()
    said = [r.message for r in caplog.records if "can't be recorded" in r.message]
    assert len(said) == 2 and all("would wait for the device" in m for m in said)
    assert "of the target (llama) that run ahead" in said[0] and "wait for the host" in said[0]
    assert "of the target (llama) can't" in said[1] and "launched operation by operation" in said[1]
    assert engine.runner.buckets == () and tapes.made > 0  # the draft's blocks were
    other = launched(steady_engine(tiny, scheduler="fixed"), proposer_for(tiny, "dspark"))
    assert_same(given, rounds_of(other, requests(tiny)))


def test_where_memory_ends_smaller_steps_stay_recorded(
    tiny: Target, tapes: Tapes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"))
    replays = engine.runner._replays
    assert replays is not None
    record, made = replays._record, []

    def poor(body: Any) -> Any:
        recorded = record(body)
        made.append(recorded.out[1].shape[0])
        if made[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorded

    monkeypatch.setattr(replays, "_record", poor)
    with caplog.at_level(logging.WARNING):
        given = rounds_of(engine, requests(tiny))
    assert 0 < max(engine.runner.buckets) <= 12 and replays.possible
    assert all("Some steps of the target (llama)" in r.message for r in caplog.records if "recorded" in r.message)
    assert given[0] == rounds_of(launched(steady_engine(tiny), proposer_for(tiny, "dspark")), requests(tiny))[0]


def test_a_step_in_which_something_is_recorded_teaches_nothing_about_costs(tiny: Target, tapes: Tapes) -> None:
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    heard: list[tuple[int, int]] = []
    engine.step_cost.observe = lambda tokens, *_: heard.append((tokens, tapes.made))  # type: ignore[method-assign, union-attr]
    before, steps = tapes.made, 0
    for r in requests(tiny)[:2]:
        engine.submit(r)
    while engine.has_work:
        was, count = tapes.made, len(heard)
        engine.step()
        steps += 1
        assert tapes.made == was or len(heard) == count
    assert tapes.made > before and 0 < len(heard) < steps
    assert {n for n, _ in heard} <= set(engine.runner.buckets), "as they were run"


def test_drafts_are_swapped_under_recorded_steps(cache_dir: Path, tapes: Tapes) -> None:
    """Other layers are tapped, other weights draft, a draft comes back to other pages: nothing of a former recording is
    left."""
    rounds, texts = [], []
    for recorded in (True, False):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        drafts = {n: proposer_for(target, n) for n in ("dspark", "eagle3")}
        several = SeveralDrafts(drafts, "dspark", target.vocab_size)
        if recorded:
            engine = steady_engine(target, several, skip_drafts=False)
        else:
            engine = launched(steady_engine(target, skip_drafts=False), several)
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
    engine = steady_engine(tiny, proposer_for(tiny, "dspark"), scheduler="fixed")
    engine.runner.buckets = (1, 2)
    given = rounds_of(engine, requests(tiny))
    assert set(engine.runner._inputs) <= {1, 2}
    other = launched(steady_engine(tiny, scheduler="fixed"), proposer_for(tiny, "dspark"))
    assert_same(given, rounds_of(other, requests(tiny)))
    assert [size_for(n, SIZES) for n in (1, 9, 256, 257)] == [1, 12, 256, None]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["none", *KINDS])
@pytest.mark.parametrize(
    ("rule", "scheduler", "temperature"),
    [
        ("coupled", "global", 0.0),
        ("coupled", "global", 0.9),
        ("ratio", "early_stop", 0.9),
        ("coupled", "fixed", 0.9),
        ("ratio", "asynchronous", 0.9),
    ],
)
def test_cuda_graphs_say_what_launched_steps_do(
    name: str, rule: str, scheduler: str, temperature: float, cache_dir: Path
) -> None:
    """The same on a device, with its kernels, in CUDA graphs."""
    settings = {"rule": rule, "scheduler": scheduler, "skip_drafts": False}
    given = []
    for graphs in (True, False):
        target = load_target(TargetConfig(path="tiny", device="cuda"), cache_dir)
        engine = steady_engine(target, proposer_for(target, name, rule), cuda_graphs=graphs, **settings)
        assert bool(engine.runner.buckets) == graphs
        engine.runner.buckets = engine.runner.buckets or SIZES[:14]  # the same schedule
        given.append(rounds_of(engine, requests(target, temperature=temperature, top_p=0.95)))
        assert not graphs or engine.runner.buckets, "what can't be recorded takes the sizes away"
        ahead = scheduler in ("fixed", "asynchronous") and name != "none"
        replays = engine.runner._ahead_replays
        assert (replays is not None and bool(replays._recorded)) == (graphs and ahead)
    assert_same(*given)
