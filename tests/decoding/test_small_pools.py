"""A KV pool that runs out changes no text; what it can never hold is refused, and how much it holds is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TargetConfig
from pipeline.decoding import Request, SeveralDrafts
from pipeline.decoding.request import Sequence
from pipeline.errors import DraftlineError
from pipeline.target import Target, load_target
from tests.decoding.samples import NAMES, NEW, engine_of, proposer_for


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_pool_that_runs_out_changes_no_text(
    cache_dir: Path,
    alike: list[list[int]],
    alike_expected: list[list[int]],
    name: str,
    keep: bool,
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    pages = 11 if keep else 15  # what alike have in common is there once
    engine = engine_of(target, proposer_for(target, name), pages, prefix_cache=keep)
    gave_up: list[str] = []
    inner = engine.batch.preempt

    def preempt(s: Sequence) -> None:
        assert s is not engine.batch.running[0], "the oldest stays"
        gave_up.append(s.request.id)
        inner(s)

    engine.batch.preempt = preempt  # type: ignore[method-assign]
    events: dict[str, list[int]] = {}
    asked = [Request(i, max_new_tokens=NEW, logprobs=1, id=f"{n}") for n, i in enumerate(alike)]
    done = engine.generate(asked, lambda e: events.setdefault(e.request_id, []).extend(e.token_ids))
    assert [c.token_ids for c in done] == alike_expected
    assert [events[r.id] for r in asked] == alike_expected, "nothing is said twice"
    assert sum(c.metrics.preempted for c in done) == len(gave_up) > 0
    # What a request finds of itself when it comes back is no part of its prompt that was cached.
    assert all(c.metrics.cached_prompt <= c.metrics.cached * keep for c in done)
    assert all(c.metrics.cached_prompt < len(i) for c, i in zip(done, alike, strict=True))
    for c in done:
        assert c.logprobs is not None and [p.token_id for p in c.logprobs] == c.token_ids
        assert c.metrics.decoded == len(c.token_ids) - 1 and c.metrics.ttft > 0
    assert engine.runner.pool.available == pages and not engine.runner.pool.refs.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_text_whatever_the_pool(cache_dir: Path, alike: list[list[int]], name: str) -> None:
    texts, preempted, cached = [], [], []
    for pages, keep in ((0, True), (11, True), (13, False)):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer_for(target, name), pages, prefix_cache=keep)
        asked = [
            Request(i, NEW, temperature=0.9, top_p=0.95, seed=n, frequency_penalty=0.3, ignore_eos=True)
            for n, i in enumerate(alike)
        ]
        done = engine.generate(asked)
        texts.append([c.token_ids for c in done])
        preempted.append(sum(c.metrics.preempted for c in done))
        cached.append(sum(c.metrics.cached for c in done))
    assert all(t == texts[0] for t in texts)
    assert preempted[0] == 0 and min(preempted[1:]) > 0
    assert cached[2] == 0 and min(cached[:2]) > 0


def test_what_can_never_fit_is_refused_with_the_remedy(tiny: Target) -> None:
    engine = engine_of(tiny, proposer_for(tiny, "dspark"), pages=4)
    engine.submit(Request([5] * 20, max_new_tokens=40))
    with pytest.raises(DraftlineError, match=r"prompt_ids \+ max_new_tokens is 61; .* 4 pages .*Raise engine.kv_gib"):
        engine.submit(Request([5] * 20, max_new_tokens=41))
    while engine.has_work:
        engine.step()


def test_how_long_a_text_may_be_is_told_where_the_pages_hold_less(
    tiny: Target,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of(tiny, proposer_for(tiny, "dspark"), pages=4)
    block = engine.proposer.block_size
    assert engine.most_tokens == 64 - block < 512
    (told,) = [r.message for r in caplog.records if "engine.max_context" in r.message]
    assert (
        f"may have {64 - block} tokens, not the 512 of engine.max_context: the KV pool's 4 pages of 16 tokens" in told
    )
    (done,) = engine.generate([Request([5] * 20, max_new_tokens=engine.most_tokens - 20, ignore_eos=True)])
    assert done.finish_reason == "length" and len(done.token_ids) == engine.most_tokens - 20
    caplog.clear()
    assert engine_of(tiny, proposer_for(tiny, "dspark")).most_tokens == 512 and not caplog.records


def test_a_block_longer_than_a_page_takes_nothing_of_the_context(tiny: Target) -> None:
    draft = proposer_for(tiny, "dspark")
    engine = engine_of(tiny, draft, max_requests=1, max_context=32, page_size=2)
    assert draft.block_size > 2 and engine.most_tokens == 32
    (done,) = engine.generate([Request([5] * 20, max_new_tokens=12, ignore_eos=True)])
    assert len(done.token_ids) == 12


def test_a_preempted_request_comes_back_with_its_draft_or_the_default_once_that_is_gone(
    tiny: Target,
    alike: list[list[int]],
    alike_expected: list[list[int]],
) -> None:
    drafts = SeveralDrafts({n: proposer_for(tiny, n) for n in ("dspark", "dflash")}, "dspark", tiny.vocab_size)
    engine = engine_of(tiny, drafts)
    for n in (0, 1):
        engine.submit(Request(alike[n], max_new_tokens=NEW, draft="dspark" if n else None, id=f"{n}"))
    done: dict[str, Any] = {}
    for step in range(200):
        if step == 8:
            engine.change_drafts(default="dflash")
            engine.batch.preempt(engine.batch.running[0])
        if step == 12:
            assert [s.metrics.draft for s in engine.batch.running] == ["dspark", "dspark"]
            tags = [drafts.tag(s, 16) for s in engine.batch.running]
            engine.change_drafts(default="dflash", remove=["dspark"])
            assert [drafts.tag(s, 16) for s in engine.batch.running] == tags, "of the draft that they end with"
            engine.batch.preempt(engine.batch.running[1])
        if step == 14:
            assert [s.metrics.draft for s in engine.batch.running] == ["dspark", "dflash"]
        done |= {e.request_id: e.finished for e in engine.step() if e.finished}
        if len(done) == 2:
            break
    assert [done[f"{n}"].token_ids for n in (0, 1)] == alike_expected[:2]
    assert [done[f"{n}"].metrics.preempted for n in (0, 1)] == [1, 1]
    assert drafts.names == ["dflash"] and len(drafts.resident) == 1
