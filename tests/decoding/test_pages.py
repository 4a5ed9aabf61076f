"""Pages: none lost, none used twice, every hit holds what it stands for; and no text changes by them."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, SeveralDrafts, make_proposer
from pipeline.decoding.batch import Batch
from pipeline.decoding.cache import page_bytes, pool_pages
from pipeline.decoding.held import HeldCommits
from pipeline.decoding.pages import PagePool, chain_key
from pipeline.decoding.request import RequestRefused, Sequence
from pipeline.decoding.tables import PageTables
from pipeline.decoding.worth import DraftWorth
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target, load_target
from tests.decoding.test_engine import KINDS, prompt_ids
from tests.decoding.test_worth import IDLE
from tests.drafts.conftest import cache_dir, tiny  # noqa: F401
from tests.drafts.samples import small_draft

NAMES = ["none", "ngram", *KINDS]
SIZE = 4
NEW = 40

# -- accounting ---------------------------------------------------------------------------------------------------


class Model:
    """The engine's own Batch without a target: requests come, are read in chunks, decode with blocks and leave.

    The model stands for the target and for the draft. `cells` says of every cell which text's position was written
    last, `drafts` the same of the draft's; what a request would attend to is compared with its own text after every
    move.
    """

    def __init__(self, pages: int, most: int, block: int, kind: str, seed: int) -> None:
        self.pool = PagePool(pages, SIZE)
        self.block_size, self.kind = block, kind
        config = EngineConfig(max_requests=most, max_queue=12)
        self.batch = Batch(self.pool, self, config, self, HeldCommits())  # type: ignore[arg-type]
        self.random = random.Random(seed)
        self.cells: dict[int, tuple[int, ...]] = {}
        self.drafts: dict[int, tuple[int, ...]] = {}
        self.context: dict[Sequence, int] = {}
        self.since: dict[Sequence, int] = {}
        self.ended: list[Sequence] = []
        self.hits = self.preempted = 0

    # -- what the batch asks of the cache and of the draft --

    def tag(self, s: Sequence, end: int) -> Any:
        return None if self.kind == "none" else (7, s.tokens[end] if self.kind == "eagle3" else None)

    def admit(self, s: Sequence) -> None:
        self.hits += s.computed
        self.context[s] = s.computed
        # Who is never drafted for may have found pages without the draft's.
        self.since[s] = 0 if s.draft_limit > 0 else s.computed

    def release(self, s: Sequence) -> None:
        del self.context[s]

    def wipe(self, pages: list[int]) -> None:
        for page in pages:
            assert self.pool.refs[page] == 1, "what others read is not wiped"
            for cell in range(page * SIZE, (page + 1) * SIZE):
                self.cells.pop(cell, None)
                self.drafts.pop(cell, None)

    # -- moves --

    def arrive(self, prompt: list[int], new: int) -> None:
        with contextlib.suppress(RequestRefused):  # too long for the pool, or the queue is full
            self.batch.enqueue(Sequence(Request(prompt, max_new_tokens=new), frozenset(), list(prompt)))

    def preempt(self, s: Sequence) -> None:
        self.batch.preempt(s)
        self.preempted += 1

    def step(self) -> None:
        self.batch.admit()
        before = list(self.batch.running)
        assert self.batch.reserve() is None, "the oldest always fits"
        after = self.batch.running
        assert after == before[: len(after)], "the youngest go first"
        self.preempted += len(before) - len(after)
        self.check()
        for s in list(after):
            if not s.prefilled:
                end = min(s.computed + 6, s.prefill_end)
                self.write(s, s.computed, s.tokens[s.computed : end])
                s.computed = end
                if s.prefilled and len(s.tokens) == s.prompt_length:
                    s.tokens.append(self.random.randrange(3))
            else:
                proposed = [self.random.randrange(3) for _ in range(min(self.block_size, s.draft_limit))]
                self.write(s, s.computed, [s.tokens[-1], *proposed], draft=False)
                accepted = self.random.randrange(len(proposed) + 1)
                s.tokens += [*proposed[:accepted], self.random.randrange(3)]
                s.computed += accepted + 1
            self.commit(s)
            if s.prefilled:
                self.batch.settle(s)
            if len(s.tokens) >= s.prompt_length + s.request.max_new_tokens:
                self.batch.remove(s, sound=True)
                self.ended.append(s)

    def write(self, s: Sequence, start: int, tokens: list[int], draft: bool = True) -> None:
        text = (*s.tokens[:start], *tokens)
        for p in range(start, start + len(tokens)):
            page = s.pages[p // SIZE]
            assert self.pool.refs[page] == 1, "written cells are nobody else's"
            self.cells[page * SIZE + p % SIZE] = text[: p + 1]

    def commit(self, s: Sequence) -> None:
        """The draft's context grows to what is computed, as DraftContext has it; then slots of a block lie behind."""
        if self.kind == "none":
            return
        extra = self.kind == "eagle3"
        end = min(s.computed, len(s.tokens) - extra)
        for p in range(self.context[s], end):
            self.drafts[s.pages[p // SIZE] * SIZE + p % SIZE] = tuple(s.tokens[: p + 1 + extra])
        for i in range(self.context[s] // SIZE, end // SIZE):
            self.pool.mark(s.pages[i], self.tag(s, (i + 1) * SIZE))
        self.context[s] = end
        for p in range(end, min(end + self.block_size, len(s.pages) * SIZE)):
            self.drafts[s.pages[p // SIZE] * SIZE + p % SIZE] = (-1,)

    def check(self) -> None:
        held: dict[int, int] = {}
        assert {*self.context} == {*self.batch.running} and not any(s.pages for s in self.batch.waiting)
        for s in self.batch.running:
            assert len(set(s.pages)) == len(s.pages)
            for page in s.pages:
                held[page] = held.get(page, 0) + 1
            for p in range(s.computed):
                assert self.cells[s.pages[p // SIZE] * SIZE + p % SIZE] == tuple(s.tokens[: p + 1])
            extra = self.kind == "eagle3"
            for p in range(self.since[s], self.context[s] if self.kind != "none" else 0):
                assert self.drafts[s.pages[p // SIZE] * SIZE + p % SIZE] == tuple(s.tokens[: p + 1 + extra])
        assert {p: int(n) for p, n in enumerate(self.pool.refs) if n} == held
        free = int(self.pool._free.sum())
        assert free == self.pool._free_count
        assert free + self.pool.kept + len(held) == self.pool.pages
        assert not {*self.pool._kept} & {*held} and not any(self.pool._free[p] for p in [*held, *self.pool._kept])
        assert {*self.pool._key} | {*self.pool._tags} <= {*held, *self.pool._kept}
        assert sorted(p for ps in self.pool._listed.values() for p in ps) == sorted(self.pool._key)


@settings(max_examples=80, deadline=None)
@given(
    pages=st.integers(8, 30),
    most=st.integers(1, 4),
    block=st.integers(0, 5),
    kind=st.sampled_from(["none", "dspark", "eagle3"]),
    moves=st.lists(
        st.tuples(st.sampled_from(["arrive", "step", "step", "step", "cancel", "preempt"]), st.integers(0, 10**6)),
        max_size=60,
    ),
)
def test_pages_are_never_lost_or_used_twice(
    pages: int, most: int, block: int, kind: str, moves: list[tuple[str, int]]
) -> None:
    model = Model(pages, most, block, kind, seed=len(moves))
    for move, number in moves:
        chance = random.Random(number)
        if move == "arrive":
            # Few tokens and common beginnings: many prompts find each other's pages.
            prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0][: chance.randrange(10)] + [0] * chance.randrange(1, 8)
            model.arrive(prompt + [chance.randrange(3) for _ in range(chance.randrange(3))], chance.randrange(1, 20))
        elif move == "cancel" and not model.batch.empty:
            everyone = list(model.batch)
            model.batch.remove(everyone[number % len(everyone)], sound=False)
        elif move == "preempt" and model.batch.running:
            model.preempt(model.batch.running[number % len(model.batch.running)])
        else:
            model.step()
        model.check()
    for _ in range(2000):
        if model.batch.empty:
            break
        model.step()
    model.check()
    assert model.batch.empty, "everyone gets to the end"
    assert model.pool.available == model.pool.pages and not model.pool.refs.any()
    model.pool.forget()
    assert model.pool.kept == 0 and model.pool._free.all() and not model.pool._tags


def test_the_model_of_the_test_above_has_hits_and_preemptions() -> None:
    model = Model(16, 4, 3, "eagle3", 0)
    for i in range(12):
        model.arrive([0, 1, 2, 0, 1, 1, 2, 2, 0, i % 2, 1, 1, 2], 18)
        model.step()
    while not model.batch.empty:
        model.step()
    assert model.hits > 50 and model.preempted > 3 and len(model.ended) == 12


def waiting_for_a_prompt(kind: str = "dspark") -> tuple[Model, list[Sequence]]:
    """One prompt of 13 tokens is being read; two choices of it and another prompt wait."""
    model = Model(40, 4, 3, kind, 0)
    for prompt in [[1, 2, 0] * 4 + [1]] * 3 + [[2]]:
        model.arrive(prompt, 18)
    everyone = list(model.batch)
    model.step()
    assert model.batch.running == everyone[:1] and list(model.batch.waiting) == everyone[1:]
    assert everyone[0].computed == 6
    return model, everyone


@pytest.mark.parametrize("kind", ["none", "dspark", "eagle3"])
def test_choices_of_a_prompt_wait_until_it_is_read_and_find_it(kind: str) -> None:
    model, everyone = waiting_for_a_prompt(kind)
    model.step()
    assert model.batch.running == everyone[:1] and not everyone[0].prefilled
    model.step()
    assert model.batch.running == everyone[:1] and everyone[0].prefilled
    model.batch.admit()
    assert model.batch.running == everyone, "in order"
    assert [s.computed for s in everyone[1:]] == [12, 12, 0]
    while not model.batch.empty:
        model.step()


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is preempted"])
def test_who_waits_for_a_prompt_goes_on_without_it(how: str) -> None:
    model, everyone = waiting_for_a_prompt()
    first, second, third, last = everyone
    if how == "is preempted":
        model.preempt(first)
    else:
        model.batch.remove(first, sound=False)
    for s in list(model.batch.running):
        model.batch.remove(s, sound=False)
    model.batch.admit()
    reader = first if how == "is preempted" else second
    assert model.batch.running == [reader] and reader.computed == 0
    while third in model.batch.waiting:
        model.step()
    assert third.computed >= 12 and last in model.batch.running
    while not model.batch.empty:
        model.step()
    assert len(model.ended) == (4 if how == "is preempted" else 3)


def test_nobody_waits_for_a_prompt_whose_pages_it_could_not_take() -> None:
    """Those of another draft, those behind a page that differs, or any without a prefix cache."""
    prompt = [1, 2, 0] * 4 + [1]
    for tag, keep, other, waits in (
        (lambda s, end: (s.request.draft, None), True, prompt, False),
        (lambda s, end: 7, True, [0, *prompt], False),
        (lambda s, end: 7, False, prompt, False),
        (lambda s, end: None, True, prompt, True),
        (lambda s, end: (7, s.tokens[end]), True, [*prompt[:4], 0], False),
        (lambda s, end: (7, s.tokens[end]), True, [*prompt[:5], 0], True),
    ):
        tables = PageTables(PagePool(40, SIZE), keep=keep)
        asked = [Request(p, max_new_tokens=5, draft=d) for p, d in ((prompt, "old"), (other, "new"))]
        first, second = (Sequence(r, frozenset(), list(r.prompt_ids)) for r in asked)
        assert tables.admit(first, tag, [])
        free = tables.pool.available
        assert tables.admit(second, tag, [first]) is not waits
        assert not waits or (tables.pool.available == free and not second.pages), "nothing has changed"


def test_pages_of_a_text_lie_side_by_side_and_leave_each_other_room() -> None:
    pool = PagePool(64, 4)
    tables = [pool.take(3) for _ in range(4)]
    for _ in range(10):
        for t in tables:
            t += pool.take(1, t[-1])
    assert all(b == a + 1 for t in tables for a, b in zip(t, t[1:], strict=False))


def test_the_longest_unused_page_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pool = PagePool(4, 2)
    first, second = pool.take(2), pool.take(2)
    keys = {page: chain_key(b"", [page]) for page in (*first, *second)}
    for page, key in keys.items():
        pool.publish(page, key)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.kept == pool.available == 4
    pool.share(pool.find(keys[first[0]], None))  # type: ignore[arg-type]
    pool.give_back([first[0]])
    gone = []
    for _ in range(4):
        pool.take(1)
        gone += [p for p, key in keys.items() if p not in gone and pool.find(key, None) is None]
    assert gone == [first[1], second[1], second[0], first[0]]
    with pytest.raises(RuntimeError, match="1 pages wanted, 0 available"):
        pool.take(1)
    pool.give_back([0, 1, 2, 3])
    with pytest.raises(AssertionError, match="not held"):
        pool.give_back([2])


def test_a_page_is_found_for_the_draft_that_wrote_it_and_its_double_is_not_kept() -> None:
    pool = PagePool(8, 2)
    key = chain_key(b"", [1, 2])
    plain, drafted, again = pool.take(3)
    for page in (plain, drafted, again):
        pool.publish(page, key)
    pool.mark(drafted, (1, None))
    pool.mark(again, (1, None))
    assert pool.find(key, None) == plain and pool.find(key, (1, None)) == drafted and pool.find(key, (2, None)) is None
    pool.give_back([plain, drafted, again])
    assert pool.kept == 1 and pool.find(key, (1, None)) is not None
    pool.untag(1)
    assert pool.find(key, (1, None)) is None and pool.find(key, None) is not None


def test_the_pool_s_size() -> None:
    cpu = torch.device("cpu")
    assert pool_pages(EngineConfig(max_requests=3, max_context=100), 1000, cpu) == 3 * 8
    assert pool_pages(EngineConfig(max_requests=3, max_context=100), 1000, cpu, block=29) == 3 * 9
    assert pool_pages(EngineConfig(kv_gib=0.5), 2**20, cpu) == 512
    few = pool_pages(EngineConfig(max_requests=1000, max_context=10**6), 2**30, cpu)
    assert few < 1000, "within the free memory"
    with pytest.raises(ConfigError, match=r"engine.kv_gib=0.001 holds not a single page of 16 tokens"):
        pool_pages(EngineConfig(kv_gib=0.001), 2**30, cpu)


# -- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(cache_dir: Path) -> list[list[int]]:  # noqa: F811
    """Some that begin alike for several pages, in the middle of one too, and one that is another's beginning."""
    ids = prompt_ids(load_target(TargetConfig(path="tiny"), cache_dir))
    common = (ids[2] * 3)[:50]
    return [common + ids[0], common + ids[1], common[:40] + ids[3], common, common + ids[0] + ids[4], ids[4]]


@pytest.fixture(scope="module")
def expected(cache_dir: Path, prompts: list[list[int]]) -> list[list[int]]:  # noqa: F811
    """transformers' own greedy text."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    out = []
    for ids in prompts:
        with torch.inference_mode():
            text = target.model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        out.append(text[0, len(ids) :].tolist())
    return out


def proposer(target: Target, name: str, rule: str = "coupled", **changes: Any) -> Any:
    if name not in KINDS:
        return make_proposer(name)
    return make_proposer(name, small_draft(target, **{**KINDS[name], **changes}), rule=rule)


def engine_of(target: Target, drafts: Any, pages: int = 0, **changes: Any) -> Engine:
    """pages: of 16 tokens, where given."""
    c = target.config
    shapes = [(c.num_key_value_heads, c.head_dim, c.head_dim)] * c.num_hidden_layers
    each = page_bytes(shapes, 16, torch.float32) + drafts.page_bytes(16)
    options: dict[str, Any] = {
        "max_requests": 3,
        "max_context": 512,
        "threads": 1,
        "prefill_chunk": 23,
        "scheduler": "fixed",
    }
    if pages:
        options["kv_gib"] = (pages + 0.5) * each / 2**30
    engine = Engine(target, EngineConfig(**{**options, **changes}), drafts)
    assert pages == 0 or engine.runner.pool.pages == pages
    return engine


def same_rounds(a: Any, b: Any) -> bool:
    """Whether the drafts saw the same: what was verified and accepted at every position."""
    return all((m.lengths, m.accepted_at) == (n.lengths, n.accepted_at) for m, n in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_hit_changes_no_text_and_no_draft(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
    name: str,
) -> None:
    found = []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer(target, name), pages=100, prefix_cache=keep)
        done = [c for i in prompts for c in engine.generate([Request(i, max_new_tokens=NEW)])]
        done += engine.generate([Request(i, max_new_tokens=NEW) for i in prompts])
        assert [c.token_ids for c in done] == expected * 2
        found.append([c.metrics for c in done])
        assert engine.runner.pool.available == 100 and not engine.runner.pool.refs.any()
    assert not any(m.cached for m in found[0])
    # 50 tokens alike are three whole pages; of a prompt met again at least its last token is computed.
    assert [m.cached for m in found[1][:6]] == [0, 48, 32, 48, len(prompts[0]) // 16 * 16, 0]
    assert [m.cached for m in found[1][6:]] == [(len(i) - 1) // 16 * 16 for i in prompts]
    assert all(m.cached_prompt == m.cached for ms in found for m in ms)
    if name != "ngram":  # its confidences and tries are of all texts so far
        assert same_rounds(*found)


@pytest.mark.parametrize("name", NAMES)
def test_choices_of_a_prompt_read_it_once(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    name: str,
) -> None:
    texts, read = [], []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer(target, name), prefix_cache=keep, max_requests=4)
        done = engine.generate(Request(prompts[4], NEW, temperature=0.9, ignore_eos=True).samples(4))
        texts.append([c.token_ids for c in done])
        read.append([len(prompts[4]) - c.metrics.cached for c in done])
    rest = (len(prompts[4]) - 1) % 16 + 1
    assert texts[0] == texts[1]
    assert read == [[len(prompts[4])] * 4, [len(prompts[4]), rest, rest, rest]]


def test_a_conversation_goes_on_where_it_ended(tiny: Target, prompts: list[list[int]]) -> None:  # noqa: F811
    """What was said is found as well as what was asked."""
    engine = engine_of(tiny, proposer(tiny, "dspark"))
    (first,) = engine.generate([Request(prompts[0], max_new_tokens=NEW, ignore_eos=True)])
    text = prompts[0] + first.token_ids
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
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    name: str,
    many: bool,
) -> None:
    """Where few run, its draft finds its keys of what was said too; where many do, of what was asked."""
    metrics = []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer(target, name), prefix_cache=keep, max_requests=8, scheduler="global")
        engine.step_cost, engine._worth = IDLE.copy(), Told()
        others = [Request([7 + i] * 20, 26, ignore_eos=True) for i in range(5 * many)]
        first, *_ = engine.generate([Request(prompts[0], 24, ignore_eos=True), *others])
        engine._worth.now = True
        text = prompts[0] + first.token_ids
        (second,) = engine.generate([Request([*text, 5, 6], 20, ignore_eos=True)])
        metrics.append(second.metrics)
    assert same_rounds(metrics[:1], metrics[1:]) and metrics[1].drafted > 0
    assert metrics[1].cached == (len(prompts[0] if many else text) - 1) // 16 * 16


def test_who_is_never_drafted_for_takes_pages_of_any_draft(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """And leaves none behind from which a draft would draft without its context."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    drafts = SeveralDrafts({n: proposer(target, n) for n in ("dspark", "eagle3")}, "eagle3", target.vocab_size)
    engine = engine_of(target, drafts)

    def ask(draft: str | None, max_draft: int | None = None) -> Any:
        (done,) = engine.generate([Request(prompts[0], max_new_tokens=NEW, draft=draft, max_draft=max_draft)])
        assert done.token_ids == expected[0]
        return done.metrics

    whole = (len(prompts[0]) - 1) // 16 * 16
    assert ask("dspark").cached == 0
    plain = ask(None, 0)
    assert (plain.cached, plain.drafted) == (whole, 0)
    drafted = ask("eagle3")
    fresh = load_target(TargetConfig(path="tiny"), cache_dir)
    (alone,) = engine_of(fresh, proposer(fresh, "eagle3")).generate([Request(prompts[0], max_new_tokens=NEW)])
    assert drafted.cached == 0 and same_rounds([alone.metrics], [drafted])


def test_eagle3_s_pages_are_found_by_the_token_behind_them_too(cache_dir: Path, prompts: list[list[int]]) -> None:  # noqa: F811
    """Two texts share their first page and part with the token after it: the pair there is not the same."""
    page = prompts[0][:16]
    texts = [page + [7] * 20, page + [9] * 20, page + [9] * 20 + [4, 4]]
    rounds, cached = [], []
    for keep in (False, True):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer(target, "eagle3"), prefix_cache=keep)
        done = [engine.generate([Request(t, max_new_tokens=NEW, ignore_eos=True)])[0].metrics for t in texts]
        rounds.append(done)
        cached.append([m.cached for m in done])
    assert same_rounds(*rounds)
    assert cached == [[0, 0, 0], [0, 0, 32]]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_pool_that_runs_out_changes_no_text(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
    name: str,
    keep: bool,
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    pages = 11 if keep else 15  # what prompts have in common is there once
    engine = engine_of(target, proposer(target, name), pages, prefix_cache=keep)
    gave_up: list[str] = []
    inner = engine.batch.preempt

    def preempt(s: Sequence) -> None:
        assert s is not engine.batch.running[0], "the oldest stays"
        gave_up.append(s.request.id)
        inner(s)

    engine.batch.preempt = preempt  # type: ignore[method-assign]
    events: dict[str, list[int]] = {}
    asked = [Request(i, max_new_tokens=NEW, logprobs=1, id=f"{n}") for n, i in enumerate(prompts)]
    done = engine.generate(asked, lambda e: events.setdefault(e.request_id, []).extend(e.token_ids))
    assert [c.token_ids for c in done] == expected
    assert [events[r.id] for r in asked] == expected, "nothing is said twice"
    assert sum(c.metrics.preempted for c in done) == len(gave_up) > 0
    # What a request finds of itself when it comes back is no part of its prompt that was cached.
    assert all(c.metrics.cached_prompt <= c.metrics.cached * keep for c in done)
    assert all(c.metrics.cached_prompt < len(i) for c, i in zip(done, prompts, strict=True))
    for c in done:
        assert c.logprobs is not None and [p.token_id for p in c.logprobs] == c.token_ids
        assert c.metrics.decoded == len(c.token_ids) - 1 and c.metrics.ttft > 0
    assert engine.runner.pool.available == pages and not engine.runner.pool.refs.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_text_whatever_the_pool(cache_dir: Path, prompts: list[list[int]], name: str) -> None:  # noqa: F811
    texts, preempted, cached = [], [], []
    for pages, keep in ((0, True), (11, True), (13, False)):
        target = load_target(TargetConfig(path="tiny"), cache_dir)
        engine = engine_of(target, proposer(target, name), pages, prefix_cache=keep)
        asked = [
            Request(i, NEW, temperature=0.9, top_p=0.95, seed=n, frequency_penalty=0.3, ignore_eos=True)
            for n, i in enumerate(prompts)
        ]
        done = engine.generate(asked)
        texts.append([c.token_ids for c in done])
        preempted.append(sum(c.metrics.preempted for c in done))
        cached.append(sum(c.metrics.cached for c in done))
    assert all(t == texts[0] for t in texts)
    assert preempted[0] == 0 and min(preempted[1:]) > 0
    assert cached[2] == 0 and min(cached[:2]) > 0


def test_what_can_never_fit_is_refused_with_the_remedy(tiny: Target) -> None:  # noqa: F811
    engine = engine_of(tiny, proposer(tiny, "dspark"), pages=4)
    engine.submit(Request([5] * 20, max_new_tokens=40))
    with pytest.raises(DraftlineError, match=r"prompt_ids \+ max_new_tokens is 61; .* 4 pages .*Raise engine.kv_gib"):
        engine.submit(Request([5] * 20, max_new_tokens=41))
    while engine.has_work:
        engine.step()


def test_how_long_a_text_may_be_is_told_where_the_pages_hold_less(
    tiny: Target,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of(tiny, proposer(tiny, "dspark"), pages=4)
    block = engine.proposer.block_size
    assert engine.most_tokens == 64 - block < 512
    (told,) = [r.message for r in caplog.records if "engine.max_context" in r.message]
    assert (
        f"may have {64 - block} tokens, not the 512 of engine.max_context: the KV pool's 4 pages of 16 tokens" in told
    )
    (done,) = engine.generate([Request([5] * 20, max_new_tokens=engine.most_tokens - 20, ignore_eos=True)])
    assert done.finish_reason == "length" and len(done.token_ids) == engine.most_tokens - 20
    caplog.clear()
    assert engine_of(tiny, proposer(tiny, "dspark")).most_tokens == 512 and not caplog.records


def test_a_block_longer_than_a_page_takes_nothing_of_the_context(tiny: Target) -> None:  # noqa: F811
    draft = proposer(tiny, "dspark")
    engine = engine_of(tiny, draft, max_requests=1, max_context=32, page_size=2)
    assert draft.block_size > 2 and engine.most_tokens == 32
    (done,) = engine.generate([Request([5] * 20, max_new_tokens=12, ignore_eos=True)])
    assert len(done.token_ids) == 12


def test_a_failed_request_s_pages_are_found_by_nobody(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    engine = engine_of(target, proposer(target, "dspark"))
    poison = target.family.embed_tokens.register_forward_hook(lambda _module, _given, out: out * float("nan"))
    (failed,) = engine.generate([Request(prompts[4], max_new_tokens=4)])
    poison.remove()
    assert failed.finish_reason == "error" and engine.runner.pool.kept == 0
    done = engine.generate([Request(i, max_new_tokens=NEW) for i in prompts])
    assert [c.token_ids for c in done] == expected


def test_a_new_draft_gets_pages_of_its_own_and_plain_decoding_takes_anyone_s(
    cache_dir: Path,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    drafts = SeveralDrafts({"v1": proposer(target, "dspark")}, "v1", target.vocab_size)
    engine = engine_of(target, drafts)

    def ask(draft: str | None = None) -> Any:
        (done,) = engine.generate([Request(prompts[0], max_new_tokens=NEW, draft=draft)])
        assert done.token_ids == expected[0]
        return done.metrics

    whole = (len(prompts[0]) - 1) // 16 * 16
    old = ask()
    assert (old.cached, ask().cached) == (0, whole)
    engine.change_drafts({"v2": proposer(target, "dflash", seed=5), "plain": proposer(target, "ngram")}, default="v2")
    new = ask()
    assert new.cached == 0, "the other draft's keys are not its own"
    again = ask()
    assert again.cached == whole and same_rounds([new], [again])
    assert ask("v1").cached == whole and same_rounds([old], [ask("v1")])
    assert ask("plain").cached == whole
    engine.change_drafts(default="v2", remove=["v1"])
    assert len({t[0] for tags in engine.runner.pool._tags.values() for t in tags}) == 1, "v1's are gone"
    fresh = load_target(TargetConfig(path="tiny"), cache_dir)
    (alone,) = engine_of(fresh, proposer(fresh, "dflash", seed=5)).generate([Request(prompts[0], max_new_tokens=NEW)])
    assert same_rounds([alone.metrics], [again])


def test_a_preempted_request_comes_back_with_its_draft_or_the_default_once_that_is_gone(
    tiny: Target,  # noqa: F811
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    drafts = SeveralDrafts({n: proposer(tiny, n) for n in ("dspark", "dflash")}, "dspark", tiny.vocab_size)
    engine = engine_of(tiny, drafts)
    for n in (0, 1):
        engine.submit(Request(prompts[n], max_new_tokens=NEW, draft="dspark" if n else None, id=f"{n}"))
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
    assert [done[f"{n}"].token_ids for n in (0, 1)] == expected[:2]
    assert [done[f"{n}"].metrics.preempted for n in (0, 1)] == [1, 1]
    assert drafts.names == ["dflash"] and len(drafts.resident) == 1
