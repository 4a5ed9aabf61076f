"""What a draft is not told of while it is skipped is kept for it, within bounds, and its blocks are the same."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.held import ROWS_EACH, HeldCommits
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.worth import DraftWorth
from pipeline.target import Target
from tests.decoding.samples import IDLE, KnownCost, prompt_ids, proposer_for, sequences


@pytest.mark.parametrize(("each", "keep"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["ngram", "dspark", "dflash", "eagle3"])
def test_a_draft_knows_what_was_held_back(
    tiny: Target,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    keep: bool,
    each: bool,
) -> None:
    """Its blocks are those of a draft that was told of every step at once; requests come and go in between, and are
    drafted for together or `each` at its time."""

    class Sometimes(DraftWorth):
        def choose(self, sequences: list[Sequence], *_: Any) -> tuple[list[Sequence], list[Sequence]]:
            now = [len(s.output) % 9 == 0 or len(s.output) > 30 for s in sequences]
            if not each:
                now = [all(now)] * len(now)
            told = [s for s, yes in zip(sequences, now, strict=True) if yes and s.draft_limit > 0]
            return told, [s for s in sequences if s not in told]

    def blocks() -> tuple[list[Any], int]:
        config = EngineConfig(max_requests=3, max_context=512, threads=1, prefix_cache=keep)
        engine = Engine(tiny, config, step_cost=IDLE.copy())
        proposer = proposer_for(tiny, name)
        engine.set_proposer(proposer)
        engine._worth = Sometimes()
        seen: list[Any] = []
        calls = 0
        propose, commit = proposer.propose, proposer.commit

        def spy(sequences: list[Sequence]) -> Proposal:
            made: Proposal = propose(sequences)
            seen.append((made.tokens.tolist(), pytest.approx(made.confidence.flatten().tolist(), abs=1e-4)))
            return made

        def count(*args: Any) -> None:
            nonlocal calls
            calls += 1
            commit(*args)

        monkeypatch.setattr(proposer, "propose", spy)
        monkeypatch.setattr(proposer, "commit", count)
        engine.generate([Request(p, 20 + 8 * i, ignore_eos=True) for i, p in enumerate(prompt_ids(tiny))])
        return seen, calls

    held, fewer = blocks()
    monkeypatch.setattr(HeldCommits, "add", lambda self, commits, taps, proposer: proposer.commit(commits, taps))
    at_once, more = blocks()
    assert len(held) > 3 and held == [(t, c.expected) for t, c in at_once]
    if name == "ngram":
        assert fewer == more, "it has no use for taps, and always knows at once"
    else:
        assert fewer < (0.9 if each or keep else 0.7) * more


class Told:
    layer_ids = (1,)

    def __init__(self) -> None:
        self.calls: list[tuple[list[Commit], torch.Tensor | None]] = []

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        self.calls.append((commits, taps))


def test_what_is_held_back_is_bounded_and_dropped_with_its_request() -> None:
    held, told, (a, b) = HeldCommits(), Told(), sequences(2)
    for i in range(3):
        taps = torch.tensor([[10.0 * i], [10.0 * i + 1]])
        held.add([Commit(a, i, slice(0, 1)), Commit(b, i, slice(1, 2))], taps, told)  # type: ignore[arg-type]
    held.drop(a)
    assert not told.calls
    held.hand_over(told)  # type: ignore[arg-type]
    ((commits, taps),) = told.calls
    assert taps is not None and [(c.start, taps[c.rows].item()) for c in commits] == [(0, 1.0), (1, 11.0), (2, 21.0)]
    held.hand_over(told)  # type: ignore[arg-type]
    assert len(told.calls) == 1
    for i in range(ROWS_EACH):
        assert held.rows(a) == i
        held.add([Commit(a, 3 + i, slice(0, 1))], torch.zeros(1, 1), told)  # type: ignore[arg-type]
    assert len(told.calls) == 2 and len(told.calls[1][0]) == ROWS_EACH and held.rows(a) == 0


def test_only_who_is_drafted_for_is_told_of_and_what_follows_stays_behind_what_is_held() -> None:
    held, told, (a, b, c) = HeldCommits(), Told(), sequences(3)
    for i in range(2):
        taps = torch.tensor([[10.0 * i], [10.0 * i + 1]])
        held.add([Commit(a, i, slice(0, 1)), Commit(b, i, slice(1, 2))], taps, told)  # type: ignore[arg-type]
    assert held.hand_over(told, [b]) == 2  # type: ignore[arg-type]
    step = [Commit(c, 0, slice(3, 5)), Commit(a, 2, slice(2, 3)), Commit(b, 2, slice(0, 2))]
    held.tell(step, torch.arange(5.0)[:, None], told)  # type: ignore[arg-type]
    assert (held.first(a), held.first(b), held.first(c)) == (0, None, None)
    held.hand_over(told)  # type: ignore[arg-type]
    assert (held.first(a), held.rows(a), held._bytes) == (None, 0, 0)
    seen = [[("abc"[[a, b, c].index(x.sequence)], x.start, t[x.rows, 0].tolist()) for x in y] for y, t in told.calls]  # type: ignore[index]
    assert seen == [
        [("b", 0, [1.0]), ("b", 1, [11.0])],
        [("c", 0, [3.0, 4.0]), ("b", 2, [0.0, 1.0])],
        [("a", 0, [0.0]), ("a", 1, [10.0]), ("a", 2, [2.0])],
    ]


def test_a_short_chat_is_never_pushed_through_a_draft_that_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 places with chats of 60 tokens and 32 rounds, one after the other, and in one of them a text that goes on: of
    that alone the draft is told, as soon as it is long. What is kept of all is bounded in bytes too."""
    held, told, everyone = HeldCommits(), Told(), sequences(64)
    length = [0] * 64
    for i in range(ROWS_EACH + 40):
        for b in range(1, 64):
            if (i + b) % 32 == 0:
                held.drop(everyone[b])
                everyone[b : b + 1], length[b] = sequences(1), 0
        commits, rows = [], 0
        for b, s in enumerate(everyone):
            count = 1 if length[b] or not b else 60
            commits.append(Commit(s, length[b], slice(rows, rows + count)))
            rows, length[b] = rows + count, length[b] + count
        held.add(commits, torch.zeros(rows, 2), told)  # type: ignore[arg-type]
    ((of_one, _),) = told.calls
    assert {c.sequence for c in of_one} == {everyone[0]} and len(of_one) == ROWS_EACH
    assert held.rows(everyone[0]) == 40
    monkeypatch.setattr("pipeline.decoding.held.MOST_BYTES", 10 * 64 * 2 * 4 + held._bytes)
    bytes_before = held._bytes
    for i in range(10):
        commits = [Commit(s, length[b] + i, slice(b, b + 1)) for b, s in enumerate(everyone)]
        held.add(commits, torch.zeros(64, 2), told)  # type: ignore[arg-type]
    (_, (of_some, _)) = told.calls
    handed = {c.sequence for c in of_some}
    assert everyone[0] in handed
    assert not any(held.rows(s) for s in handed) and any(map(held.rows, everyone)), "the older half of the steps"
    assert held._bytes < bytes_before


def test_what_a_draft_is_told_before_it_is_asked_counts_as_drafting_and_apart(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a text was skipped or not: the prompt first, then what each round emitted."""
    seen: list[tuple[int, int]] = []
    spent: list[float] = []

    class Spy(KnownCost):
        def observe_draft(self, requests: int, seconds: float, rows: int = 0, committing: float = 0.0) -> None:
            seen.append((requests, rows))
            spent.append(seconds + committing)
            assert committing > 0.25 > seconds > 0

    cost = Spy([1, 8, 64], [0], [[1.0], [1.05], [1.4]], draft=0.3)
    config = EngineConfig(max_requests=1, max_context=512, threads=1, prefix_cache=False)
    proposer = proposer_for(tiny, "dspark")
    engine = Engine(tiny, config, proposer, step_cost=cost)
    commit = proposer.commit
    monkeypatch.setattr(proposer, "commit", lambda *args: (commit(*args), time.sleep(0.26)))

    class Twice(DraftWorth):
        def choose(self, sequences: list[Sequence], *_: Any) -> tuple[list[Sequence], list[Sequence]]:
            return (sequences, []) if len(sequences[0].output) in (1, 2, 3, 4, 9) else ([], sequences)

    engine._worth = Twice()
    engine.set_schedule("fixed", 0)
    engine.scheduler.weighs_cost = True
    (prompt, *_) = prompt_ids(tiny)
    (done,) = engine.generate([Request(prompt, 12, ignore_eos=True)])
    assert seen == [(1, len(prompt)), (1, 1), (1, 1), (1, 1), (1, 5)]
    assert done.metrics.draft_seconds == pytest.approx(sum(spent), rel=1e-3)
