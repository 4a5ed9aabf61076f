"""What isn't finite ends whose it is, with its cause, and nobody beside it or after it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from pipeline.decoding import Request
from pipeline.decoding.attention import Segment, StepLayout
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target
from tests.decoding.samples import engine_for, prompt_ids, proposer_for


def test_not_finite_logits_fail_one_request_only(
    tiny: Target,
    draft: DSparkDraft,
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
    tiny: Target,
    draft: DSparkDraft,
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
def test_a_step_s_nan_stays_with_whose_it_is(tiny: Target, draft: DSparkDraft, softcap: float) -> None:
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
    tiny: Target,
    draft: DSparkDraft,
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


def test_a_draft_s_nan_is_not_verified(tiny: Target, draft: DSparkDraft, expected: list[list[int]]) -> None:
    engine = engine_for(tiny, draft, "dspark", scheduler="global")
    inner = engine.proposer.propose

    def broken(sequences: list[Any]) -> Any:
        return dataclasses.replace(p := inner(sequences), confidence=torch.full_like(p.confidence, float("nan")))

    engine.proposer.propose = broken  # type: ignore[method-assign]
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=30)])
    assert done.token_ids == expected[0][:30] and done.metrics.verified == 0 < done.metrics.drafted
