"""Texts that begin alike are read once, and no text and no draft is another by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TargetConfig
from pipeline.decoding import Request, SeveralDrafts
from pipeline.decoding.request import Sequence
from pipeline.decoding.worth import DraftWorth
from pipeline.target import Target, load_target
from tests.decoding.samples import IDLE, KINDS, NAMES, NEW, engine_of, proposer_for, same_rounds


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_hit_changes_no_text_and_no_draft(
    cache_dir: Path,
    alike: list[list[int]],
    alike_expected: list[list[int]],
    name: str,
) -> None:
    found = []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer_for(target, name), pages=100, prefix_cache=keep)
        done = [c for i in alike for c in engine.generate([Request(i, max_new_tokens=NEW)])]
        done += engine.generate([Request(i, max_new_tokens=NEW) for i in alike])
        assert [c.token_ids for c in done] == alike_expected * 2
        found.append([c.metrics for c in done])
        assert engine.runner.pool.available == 100 and not engine.runner.pool.refs.any()
    assert not any(m.cached for m in found[0])
    # 50 tokens alike are three whole pages; of a prompt met again at least its last token is computed.
    assert [m.cached for m in found[1][:6]] == [0, 48, 32, 48, len(alike[0]) // 16 * 16, 0]
    assert [m.cached for m in found[1][6:]] == [(len(i) - 1) // 16 * 16 for i in alike]
    assert all(m.cached_prompt == m.cached for ms in found for m in ms)
    if name != "ngram":  # its confidences and tries are of all texts so far
        assert same_rounds(*found)


@pytest.mark.parametrize("name", NAMES)
def test_choices_of_a_prompt_read_it_once(
    cache_dir: Path,
    alike: list[list[int]],
    name: str,
) -> None:
    texts, read = [], []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer_for(target, name), prefix_cache=keep, max_requests=4)
        done = engine.generate(Request(alike[4], NEW, temperature=0.9, ignore_eos=True).samples(4))
        texts.append([c.token_ids for c in done])
        read.append([len(alike[4]) - c.metrics.cached for c in done])
    rest = (len(alike[4]) - 1) % 16 + 1
    assert texts[0] == texts[1]
    assert read == [[len(alike[4])] * 4, [len(alike[4]), rest, rest, rest]]


def test_a_conversation_goes_on_where_it_ended(tiny: Target, alike: list[list[int]]) -> None:
    """What was said is found as well as what was asked."""
    engine = engine_of(tiny, proposer_for(tiny, "dspark"))
    (first,) = engine.generate([Request(alike[0], max_new_tokens=NEW, ignore_eos=True)])
    text = alike[0] + first.token_ids
    (second,) = engine.generate([Request([*text, 5, 6], max_new_tokens=4)])
    # The last token's keys were never computed.
    assert second.metrics.cached == (len(text) - 1) // 16 * 16


class Told(DraftWorth):
    """Drafts for everyone or for nobody, as it is told."""

    now = False

    def choose(self, sequences: list[Sequence], *_: Any) -> tuple[list[Sequence], list[Sequence]]:
        drafted = [s for s in sequences if self.now and s.draft_limit > 0]
        return drafted, [s for s in sequences if s not in drafted]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_conversation_goes_on_where_it_ended_though_nothing_was_drafted(
    cache_dir: Path,
    alike: list[list[int]],
    name: str,
    many: bool,
) -> None:
    """Where few run, its draft finds its keys of what was said too; where many do, of what was asked."""
    metrics = []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer_for(target, name), prefix_cache=keep, max_requests=8, scheduler="global")
        engine.step_cost, engine._worth = IDLE.copy(), Told()
        others = [Request([7 + i] * 20, 26, ignore_eos=True) for i in range(5 * many)]
        first, *_ = engine.generate([Request(alike[0], 24, ignore_eos=True), *others])
        engine._worth.now = True
        text = alike[0] + first.token_ids
        (second,) = engine.generate([Request([*text, 5, 6], 20, ignore_eos=True)])
        metrics.append(second.metrics)
    assert same_rounds(metrics[:1], metrics[1:]) and metrics[1].drafted > 0
    assert metrics[1].cached == (len(alike[0] if many else text) - 1) // 16 * 16


def test_who_is_never_drafted_for_takes_pages_of_any_draft(
    cache_dir: Path,
    alike: list[list[int]],
    alike_expected: list[list[int]],
) -> None:
    """And leaves none behind from which a draft would draft without its context."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    drafts = SeveralDrafts({n: proposer_for(target, n) for n in ("dspark", "eagle3")}, "eagle3", target.vocab_size)
    engine = engine_of(target, drafts)

    def ask(draft: str | None, max_draft: int | None = None) -> Any:
        (done,) = engine.generate([Request(alike[0], max_new_tokens=NEW, draft=draft, max_draft=max_draft)])
        assert done.token_ids == alike_expected[0]
        return done.metrics

    whole = (len(alike[0]) - 1) // 16 * 16
    assert ask("dspark").cached == 0
    plain = ask(None, 0)
    assert (plain.cached, plain.drafted) == (whole, 0)
    drafted = ask("eagle3")
    fresh = load_target(TargetConfig(path="tiny"), cache_dir)
    (alone,) = engine_of(fresh, proposer_for(fresh, "eagle3")).generate([Request(alike[0], max_new_tokens=NEW)])
    assert drafted.cached == 0 and same_rounds([alone.metrics], [drafted])


def test_eagle3_s_pages_are_found_by_the_token_behind_them_too(cache_dir: Path, alike: list[list[int]]) -> None:
    """Two texts share their first page and part with the token after it: the pair there is not the same."""
    page = alike[0][:16]
    texts = [page + [7] * 20, page + [9] * 20, page + [9] * 20 + [4, 4]]
    rounds, cached = [], []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer_for(target, "eagle3"), prefix_cache=keep)
        done = [engine.generate([Request(t, max_new_tokens=NEW, ignore_eos=True)])[0].metrics for t in texts]
        rounds.append(done)
        cached.append([m.cached for m in done])
    assert same_rounds(*rounds)
    assert cached == [[0, 0, 0], [0, 0, 32]]


def test_a_failed_request_s_pages_are_found_by_nobody(
    cache_dir: Path,
    alike: list[list[int]],
    alike_expected: list[list[int]],
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    engine = engine_of(target, proposer_for(target, "dspark"))
    poison = target.family.embed_tokens.register_forward_hook(lambda _module, _given, out: out * float("nan"))
    (failed,) = engine.generate([Request(alike[4], max_new_tokens=4)])
    poison.remove()
    assert failed.finish_reason == "error" and engine.runner.pool.kept == 0
    done = engine.generate([Request(i, max_new_tokens=NEW) for i in alike])
    assert [c.token_ids for c in done] == alike_expected


def test_a_new_draft_gets_pages_of_its_own_and_plain_decoding_takes_anyone_s(
    cache_dir: Path,
    alike: list[list[int]],
    alike_expected: list[list[int]],
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    drafts = SeveralDrafts({"v1": proposer_for(target, "dspark")}, "v1", target.vocab_size)
    engine = engine_of(target, drafts)

    def ask(draft: str | None = None) -> Any:
        (done,) = engine.generate([Request(alike[0], max_new_tokens=NEW, draft=draft)])
        assert done.token_ids == alike_expected[0]
        return done.metrics

    whole = (len(alike[0]) - 1) // 16 * 16
    old = ask()
    assert (old.cached, ask().cached) == (0, whole)
    engine.change_drafts(
        {"v2": proposer_for(target, "dflash", seed=5), "plain": proposer_for(target, "ngram")}, default="v2"
    )
    new = ask()
    assert new.cached == 0, "the other draft's keys are not its own"
    again = ask()
    assert again.cached == whole and same_rounds([new], [again])
    assert ask("v1").cached == whole and same_rounds([old], [ask("v1")])
    assert ask("plain").cached == whole
    engine.change_drafts(default="v2", remove=["v1"])
    assert len({t[0] for tags in engine.runner.pool._tags.values() for t in tags}) == 1, "v1's are gone"
    fresh = load_target(TargetConfig(path="tiny"), cache_dir)
    (alone,) = engine_of(fresh, proposer_for(fresh, "dflash", seed=5)).generate([Request(alike[0], max_new_tokens=NEW)])
    assert same_rounds([alone.metrics], [again])
