"""Pages: none lost, none used twice, every hit holds what it stands for."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EngineConfig
from pipeline.decoding import Request
from pipeline.decoding.batch import Batch
from pipeline.decoding.cache import pool_pages
from pipeline.decoding.held import HeldCommits
from pipeline.decoding.pages import PagePool, chain_key
from pipeline.decoding.request import RequestRefused, Sequence
from pipeline.decoding.tables import PageTables
from pipeline.errors import ConfigError

SIZE = 4


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
