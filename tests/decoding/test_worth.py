"""Drafting is skipped where it does not pay, comes back where it does, and changes no text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, StepCost
from pipeline.decoding.proposers.base import Commit, Proposal, WithoutContext
from pipeline.decoding.request import Sequence
from pipeline.decoding.scheduler import make_scheduler
from pipeline.decoding.worth import LONGEST_PAUSE, DraftWorth
from pipeline.target import Target, load_target
from tests.decoding.samples import IDLE, KnownCost, prompt_ids, sequences

BLOCK = 4


FULL = KnownCost([1, 64], [0], [[0.02], [1.28]], draft=0.1)
"""Every token costs as much as any, as on a saturated GPU."""


def simulate(
    rounds: int,
    requests: int,
    cost: StepCost,
    acceptance: Callable[[int, int], float],
    confidence: float = 0.7,
    lasting: int = 10**6,
) -> tuple[list[list[int]], float]:
    """Decodes in a simulated clock. acceptance: of any token, by (round, request).

    lasting: rounds of a text, after which another one takes its place; not all of them begin together.

    Returns (requests drafted for, by round; tokens per second over plain decoding's).
    """
    worth, everyone, chance = DraftWorth(), sequences(requests), random.Random(0)
    scheduler, emitted, seconds, drafted = make_scheduler("global"), 0, 0.0, []
    for i in range(rounds):
        for b in range(requests):
            if i and (i + b) % lasting == 0:
                everyone[b : b + 1] = sequences(1)
        chosen, plain = worth.choose(everyone, cost, 0)
        assert sorted(map(id, chosen + plain)) == sorted(map(id, everyone))
        drafted.append([everyone.index(s) for s in chosen])
        n = len(chosen)
        table = torch.full((requests, BLOCK), confidence)
        limits = torch.tensor([BLOCK] * n + [0] * (requests - n))
        lengths = scheduler.lengths(table, cost.drafting_for(0 if worth.trying else n), 0, limits).tolist()
        accepted = []
        for b, length in zip(drafted[-1], lengths[:n], strict=True):
            kept = 0
            while kept < length and chance.random() < acceptance(i, b):
                kept += 1
            accepted.append(kept)
        emitted += requests + sum(accepted)
        seconds += cost.seconds(requests + sum(lengths), 0) - cost.draft + cost.draft_seconds(n)
        if n:
            worth.observe(
                chosen,
                Proposal(torch.zeros(n, BLOCK, dtype=torch.int64), torch.full((n,), BLOCK), table[:n]),
                lengths,
                accepted,
            )
    plain_rate = requests / (cost.seconds(requests, 0) - cost.draft)
    return drafted, emitted / seconds / plain_rate


def test_a_draft_that_pays_is_never_skipped() -> None:
    drafted, gain = simulate(200, 2, IDLE, lambda *_: 0.8, confidence=0.8)
    assert all(len(d) == 2 for d in drafted)
    assert gain > 1.5


def test_a_draft_that_is_sure_and_wrong_is_given_up() -> None:
    """Its confidences promise what verification does not keep. Tries get rarer, and cost less than a fiftieth."""
    drafted, gain = simulate(2000, 2, IDLE, lambda *_: 0.0, confidence=0.95)
    calls = [i for i, d in enumerate(drafted) if d]
    assert calls[:2] == [0, 1]
    pauses = [b - a for a, b in zip(calls, calls[1:], strict=False)]
    assert pauses[-1] == LONGEST_PAUSE + 1 and max(pauses) == LONGEST_PAUSE + 1
    assert sum(i > 200 for i in calls) <= 1800 / LONGEST_PAUSE + 1
    assert gain > 0.98


@pytest.mark.parametrize("requests", [8, 32, 64])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.7])
def test_under_load_speculation_is_not_below_plain_decoding(requests: int, acceptance: float) -> None:
    drafted, gain = simulate(1000, requests, FULL, lambda *_: acceptance)
    assert sum(map(bool, drafted)) < 30
    assert gain > 0.98


LINEAR = KnownCost([1, 64], [0], [[0.02], [1.28]], drafting={n: (0.02 * n, 9) for n in (1, 2, 4, 8, 16, 32, 64)})
"""As FULL, and a draft for one more request costs as much as one more token too: each has a block of rows in it."""


@pytest.mark.parametrize("requests", [16, 32, 64])
@pytest.mark.parametrize("lasting", [32, 10**6])
def test_under_load_a_try_costs_little_however_dear_a_draft_for_all_is(requests: int, lasting: int) -> None:
    drafted, gain = simulate(300, requests, LINEAR, lambda *_: 0.5, lasting=lasting)
    assert gain > 0.98
    assert sum(map(bool, drafted)) >= 6, "it is tried still"


def test_tries_go_round() -> None:
    drafted, _ = simulate(1000, 64, LINEAR, lambda *_: 0.5)
    tries = [set(d) for d in drafted if d]
    assert all(4 <= len(d) <= 6 for d in tries)
    assert all(a.isdisjoint(b) for a, b in zip(tries, tries[1:], strict=False))
    assert set.union(*tries) == set(range(64))


def test_a_draft_that_becomes_good_under_load_is_found_again_and_spreads() -> None:
    cost = KnownCost([1, 512], [0], [[1.0], [2.0]], drafting={n: (0.03 * n, 9) for n in (1, 2, 4, 8, 16, 32)})
    drafted, _ = simulate(900, 32, cost, lambda i, _: 0.9 if i >= 300 else 0.0, confidence=0.9)
    assert sum(map(len, drafted[150:300])) < 0.01 * 150 * 32
    again = next(i for i in range(300, 900) if all(len(d) == 32 for d in drafted[i : i + 50]))
    assert again < 300 + 3 * LONGEST_PAUSE


@pytest.mark.parametrize("requests", [1, 2, 4])
def test_few_requests_are_drafted_for_from_their_first_round_on(requests: int) -> None:
    unknown = KnownCost([1, 8, 64], [0], [[1.0], [1.05], [1.4]])
    for cost in (IDLE, unknown):
        everyone = sequences(requests)
        assert DraftWorth().choose(everyone, cost, 0) == (everyone, [])
    many = sequences(64)
    assert len(DraftWorth().choose(many, unknown, 0)[0]) == 4, "what a draft for all costs is not known yet"


def test_a_draft_that_becomes_good_is_found_again() -> None:
    drafted, _ = simulate(1200, 1, IDLE, lambda i, _: 0.9 if i >= 500 else 0.0, confidence=0.9)
    assert sum(map(bool, drafted[300:500])) < 10
    again = next(i for i in range(500, 1200) if all(drafted[i : i + 50]))
    assert again < 500 + 4 * LONGEST_PAUSE
    assert sum(map(bool, drafted[again:])) > 0.95 * (1200 - again)


def test_it_is_decided_request_by_request() -> None:
    cost = KnownCost([1, 64], [0], [[1.0], [4.0]], drafting={n: (0.15 * n, 9) for n in (1, 2, 4, 8)})
    good = {0, 3}
    drafted, _ = simulate(600, 6, cost, lambda _, b: 0.9 if b in good else 0.0, confidence=0.9)
    late = drafted[100:]
    assert sum(good <= set(d) for d in late) > 0.9 * len(late)
    assert sum(len(set(d) - good) for d in late) < 0.1 * 4 * len(late)


def test_a_text_at_its_end_is_not_drafted_for() -> None:
    worth = DraftWorth()
    two = sequences(2)
    two[0].request.max_new_tokens = 1
    two[1].request.max_draft = 3
    assert worth.choose(two, IDLE, 0) == ([two[1]], [two[0]])


def test_a_draft_whose_confidence_is_nan_once_is_not_given_up_for_ever() -> None:
    worth, (one, other) = DraftWorth(), sequences(2)
    for i in range(20):
        confidence = torch.full((1, 4), float("nan") if i == 0 else 0.9)
        proposal = Proposal(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([4]), confidence)
        worth.observe([one], proposal, [4], [0 if i == 0 else 4])
    assert worth.choose([one, other], IDLE, 0) == ([one, other], [])


def test_what_drafting_costs_is_known_by_the_number_of_requests() -> None:
    cost = StepCost([1, 8], [0], [[1.0], [2.0]])
    assert cost.draft_seconds(3) == 0.0
    for n, seconds in ((2, 9.0), (2, 0.2), (2, 0.2), (4, 0.3), (4, 0.3)):
        cost.observe_draft(n, seconds)
    assert [cost.draft_seconds(n) for n in (1, 2, 3, 4, 8)] == pytest.approx([0.2, 0.2, 0.25, 0.3, 0.6])
    cost.observe_draft(2, 50.0)
    assert cost.draft_seconds(2) <= 0.2 * 1.1 + 1e-9, "one hiccup hardly counts"
    assert cost.drafting_for(4).seconds(1, 0) == pytest.approx(1.3)
    assert cost.copy(draft=0.5).draft_seconds(4) == 0.5


def test_what_a_draft_has_to_be_told_first_is_part_of_what_it_costs() -> None:
    cost = StepCost([1, 8], [0], [[1.0], [2.0]])
    for rows, seconds in ((1, 0.1), (1, 0.1), (60, 0.16), (80, 0.16), (0, 0.0)):
        cost.observe_draft(1, 0.2, rows, seconds)
    told = [cost.draft_seconds(1, rows) for rows in (0, 1, 64, 127)]
    assert told == pytest.approx([0.3, 0.3, 0.36, 0.42], abs=1e-3), "rows go on as they did"
    some = StepCost([1], [0], [[1.0]], drafting={1: (0.2, 9)}, committing={256: (0.64, 9)})
    assert [some.draft_seconds(1, n) for n in (64, 256, 512)] == pytest.approx([0.6, 0.84, 1.16])
    other = StepCost([1], [0], [[5.0]]).copy_with_draft_of(cost)
    cost.observe_draft(1, 0.4, 1, 0.2)
    assert other.draft_seconds(1) == pytest.approx(0.3) and other.seconds(1, 0) == pytest.approx(5.2)


def test_a_try_bears_what_the_draft_has_yet_to_be_told_and_a_draft_that_pays_only_once() -> None:
    """At 64 requests as many are tried as a tenth of the step pays for, rows included; one whose draft pays is drafted
    for although the first round costs what several gain."""
    rows = {n: (0.002 * n, 9) for n in (1, 8, 512)}
    cost = KnownCost([1, 64], [0], [[0.02], [1.28]], drafting={n: (0.005 * n, 9) for n in (1, 64)}, committing=rows)

    def tries(untold: int) -> set[int]:
        worth, many, sizes = DraftWorth(), sequences(64), set()
        for i in range(200):
            chosen, _ = worth.choose(many, cost, 0, lambda _: untold)
            if chosen:
                block = torch.zeros(len(chosen), BLOCK, dtype=torch.int64)
                full = torch.full((len(chosen),), BLOCK)
                worth.observe(chosen, Proposal(block, full, torch.full(block.shape, 0.1)), [0] * 64, [0] * 64)
                sizes |= {len(chosen)} if i > 20 else set()
        return sizes

    assert (tries(0), tries(10), tries(50)) == ({18}, {5}, {1})

    cost = KnownCost([1, 8], [0], [[1.0], [1.0]], drafting={1: (0.3, 9)}, committing={1: (0.1, 9), 256: (6.0, 9)})

    def drafted(*untold: int) -> list[bool]:
        worth, alone = DraftWorth(), sequences(1)
        for _ in range(4):
            block = torch.zeros(1, BLOCK, dtype=torch.int64)
            proposal = Proposal(block, torch.tensor([BLOCK]), torch.full((1, BLOCK), 0.9))
            worth.observe(alone, proposal, [BLOCK], [3])
        return [bool(worth.choose(alone, cost, 0, lambda _, rows=rows: rows)[0]) for rows in untold]

    assert drafted(256) == [True]
    assert drafted(10**4, 0) == [False, True], "it is weighed again when the draft was told"
    cost.committing = {1: (0.1, 9), 4: (3.5, 9)}
    assert drafted(4) == [False], "what a round adds comes again each round"


class Oracle(WithoutContext):
    """Proposes each text's own continuation, or anything else; counts what it is asked."""

    name, block_size = "oracle", BLOCK

    def __init__(self, texts: list[list[int]], prompts: list[list[int]], right: Callable[[int], bool]) -> None:
        self.layer_ids: list[int] = []
        self.known = {tuple(p): t for p, t in zip(prompts, texts, strict=True)}
        self.right = right
        self.calls: list[int] = []
        self.committed: dict[str, int] = {}

    def admit(self, sequence: Sequence) -> None:
        self.committed[sequence.request.id] = sequence.computed

    def propose(self, sequences: list[Sequence]) -> Proposal:
        self.calls.append(len(sequences))
        blocks = []
        for s in sequences:
            at = len(s.output)
            block = (self.known[tuple(s.request.prompt_ids)][at : at + BLOCK] + [0] * BLOCK)[:BLOCK]
            blocks.append(block if self.right(at) else [t + 1 for t in block])
        n = len(sequences)
        return Proposal(torch.tensor(blocks), torch.full((n,), BLOCK), torch.full((n, BLOCK), 0.95))

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        for c in commits:
            assert c.start == self.committed[c.sequence.request.id], "a position was left out"
            self.committed[c.sequence.request.id] += c.rows.stop - c.rows.start

    def release(self, sequence: Sequence) -> None: ...


def decode(target: Target, proposer: Any, rule: str = "coupled", **more: Any) -> tuple[list[list[int]], list[Any]]:
    config = EngineConfig(max_requests=2, max_context=512, threads=1, rule=rule, **more)
    engine = Engine(target, config, proposer, step_cost=IDLE.copy())
    done = engine.generate([Request(p, max_new_tokens=151, ignore_eos=True) for p in prompt_ids(target)[:3]])
    return [d.token_ids for d in done], [d.metrics for d in done]


@pytest.fixture(scope="module")
def plainly(cache_dir: Path) -> list[list[int]]:
    return decode(load_target(TargetConfig(path="tiny"), cache_dir), None)[0]


@pytest.mark.parametrize(("rule", "scheduler"), [("coupled", "global"), ("ratio", "asynchronous")])
def test_a_bad_draft_is_asked_less_and_less(
    tiny: Target,
    plainly: list[list[int]],
    rule: str,
    scheduler: str,
) -> None:
    proposer = Oracle(plainly, prompt_ids(tiny)[:3], lambda at: False)
    texts, metrics = decode(tiny, proposer, rule, scheduler=scheduler)
    assert texts == plainly
    steps = sum(m.target_steps for m in metrics)
    assert len(proposer.calls) < 0.15 * steps
    plain = steps - sum(proposer.calls)
    # The step for a text's last token has no room for a draft.
    assert plain - len(metrics) <= sum(m.skipped for m in metrics) <= plain
    always = Oracle(plainly, prompt_ids(tiny)[:3], lambda at: False)
    assert decode(tiny, always, rule, scheduler=scheduler, skip_drafts=False)[0] == plainly
    assert steps - len(metrics) <= sum(always.calls) <= steps


def test_a_good_draft_is_always_asked(tiny: Target, plainly: list[list[int]]) -> None:
    proposer = Oracle(plainly, prompt_ids(tiny)[:3], lambda at: True)
    texts, metrics = decode(tiny, proposer)
    assert texts == plainly
    assert [m.skipped for m in metrics] == [0, 0, 0]
    assert [m.tau for m in metrics] == [5.0] * 3


def test_a_draft_is_asked_again_where_it_knows_the_text(tiny: Target, plainly: list[list[int]]) -> None:
    proposer = Oracle(plainly, prompt_ids(tiny)[:3], lambda at: at > 50)
    texts, metrics = decode(tiny, proposer)
    assert texts == plainly
    assert all(m.skipped > 10 and m.accepted > 40 for m in metrics)


def test_a_new_text_is_not_judged_by_the_one_before_it() -> None:
    """One request at a time: after texts that no draft can follow, one that it follows is drafted for at once; and
    where no text ever pays, new ones soon cost next to nothing."""

    def drafted(acceptances: list[float], cost: StepCost, rounds: int = 32) -> list[int]:
        worth, chance, counts = DraftWorth(), random.Random(0), []
        for acceptance in acceptances:
            (text,) = sequences(1)
            confidence = torch.full((1, BLOCK), 0.05 + 0.9 * acceptance)
            counts.append(0)
            for _ in range(rounds):
                chosen, _ = worth.choose([text], cost, 0)
                if not chosen:
                    continue
                counts[-1] += 1
                kept = next((k for k in range(BLOCK) if chance.random() >= acceptance), BLOCK)
                block = Proposal(torch.zeros(1, BLOCK, dtype=torch.int64), torch.full((1,), BLOCK), confidence)
                worth.observe([text], block, [BLOCK], [kept])
        return counts

    mixed = drafted([0.0, 0.7, 0.0, 0.0, 0.0, 0.7, 0.0, 0.7], IDLE)
    assert all(mixed[i] > 28 for i in (1, 5, 7))
    assert all(mixed[i] < 14 for i in (2, 3, 4, 6))
    hopeless = drafted([0.3] * 40, FULL)
    assert sum(hopeless[20:]) < 0.03 * 20 * 32


def test_short_texts_are_skipped_too_where_drafts_never_pay() -> None:
    """Texts that end before they tell what they are count together."""
    worth, drafted = DraftWorth(), 0
    for _ in range(100):
        (text,) = sequences(1)
        for _ in range(3):
            chosen, _ = worth.choose([text], IDLE, 0)
            drafted += len(chosen)
            if chosen:
                block = Proposal(
                    torch.zeros(1, BLOCK, dtype=torch.int64), torch.full((1,), BLOCK), torch.full((1, BLOCK), 0.05)
                )
                worth.observe([text], block, [BLOCK], [0])
    assert drafted < 60
