"""Whether drafting is worth what it costs: per request and for the whole batch, before anything is drafted.

The prefix scheduler spends a block well once it is there; here the block itself is spared where it is not expected to
pay: a text that the draft can't follow, or a step so full that tokens to verify are as dear as tokens to emit. With R
requests in the step, t its cost and d(n) that of drafting for n of them round by round, drafting pays if

    max over S of (R + sum of a over S) / (t(R + |S|) + d(n))  >  R / t(R),

where a comes from the confidences of each request's latest rounds, scaled by what verification made of them: a draft
that is sure and wrong soon counts as one that is wrong. Their pooled search is the scheduler's own, a round on average.

Texts differ more than rounds of a text do: one that the draft follows well comes after one that it can't follow. A new
text is therefore not judged by those before it on average. It may be like the best quarter of the latest, and is
drafted for until its own first rounds tell, unless not even those would pay at the present load.

A text that was skipped brings along what the draft has yet to be told of it. That is paid once, for all the rounds that
follow: here it is spread over as many as an estimate rests on. A try has to bear it whole.

Skipped requests are tried again after 2, 4, 8, ... at most 64 rounds, the longest idle first and in turn. Where a step
is full, a draft for everyone may cost as much as the step itself, and what is learned of a few is enough: a try is for
as many as a tenth of the step pays for, or as many as cost what one does, and for one at least. Everything decided here
rests on earlier rounds, so that it is exact under both verification rules.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable

import numpy as np
import torch

from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.step_cost import StepCost

WINDOW = 8
"""Latest rounds of a request that its estimate rests on."""
TRIALS, BLOCKS = 2, 4
"""Rounds, and blocks in them, drafted before it is judged what pays: first use costs more than what follows."""
FIRST_PAUSE, LONGEST_PAUSE = 2, 64
"""Rounds skipped before a new try: the first time, and at most. At 64, trying costs a hundredth or so of the time."""
TRY_SHARE, ALIKE = 0.1, 1.25
"""What a try to learn may cost of the step that it is in; and what still counts as costing the same as one request."""
MARGIN = 1.02
"""What drafting must promise: the best of many noisy estimates flatters itself."""
TEXTS, FEW_TEXTS = 16, 4
"""Latest texts that a new one is compared with, and how many it takes to judge it by them at all."""
_DOUBT = 4.0
"""Tokens of prior evidence that confidences are right."""


@dataclasses.dataclass
class _Record:
    """What is known of drafting for one text, or for all.

    rounds: survival float64[K] of the latest rounds. predicted, accepted: fading sums over verified tokens.
    blocks: rounds in all. idle: rounds since the last draft. pause: how many are skipped before the next try.
    number: its own.
    """

    rounds: collections.deque[np.ndarray]
    predicted: float = 0.0
    accepted: float = 0.0
    blocks: int = 0
    idle: int = 0
    pause: int = FIRST_PAUSE
    number: int = 0

    def add(self, survival: np.ndarray, verified: int, accepted: int, memory: float) -> None:
        self.blocks += 1
        self.rounds.append(survival)
        self.predicted = memory * self.predicted + float(survival[:verified].sum())
        self.accepted = memory * self.accepted + accepted

    def reliability(self, prior: float) -> float:
        """Accepted per predicted token, `prior` where nothing is known."""
        return min((self.accepted + _DOUBT * prior) / (self.predicted + _DOUBT), 2.0)

    def lengthen_pause(self) -> None:
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def retry(self) -> None:
        """Before a new try: what it finds shall count more than what led to the pause."""
        self.lengthen_pause()
        while len(self.rounds) > 2:
            self.rounds.popleft()
        self.predicted, self.accepted = self.predicted / 2, self.accepted / 2


class DraftWorth:
    """Chooses whom to draft for, from the rounds so far. One object per proposer.

    Attributes:
        trying: the last choice drafts to learn, not to gain. Its draft is spent whatever is verified, and the rounds to
            come are plain: lengths are then to be chosen as if it had cost nothing.
    """

    def __init__(self) -> None:
        self.trying = False
        self._records: weakref.WeakKeyDictionary[Sequence, _Record] = weakref.WeakKeyDictionary()
        # Of all texts: what a new one starts from, and the pauses of the whole batch.
        self._all = _Record(collections.deque(maxlen=4 * WINDOW))
        self._of_draft: dict[str, _Record] = {}  # the same of each draft, where an engine has several
        self._texts: dict[str, collections.deque[_Record]] = {}  # of each draft, the latest that told what they are
        self._heard: collections.Counter[str] = collections.Counter()  # texts that each draft was tried for
        self._numbers = itertools.count()
        self._tried = 0
        self._not_paying: tuple[int, ...] | None = None

    def choose(
        self, sequences: list[Sequence], cost: StepCost, context: int, untold: Callable[[Sequence], int] = lambda _: 0
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Splits requests into those to draft for now and those to decode plainly.

        Args:
            context: their mean length. untold: rows of a request that the draft has to be told first.
        """
        able = [s for s in sequences if s.draft_limit > 0]
        records = [self._record(s) for s in able]
        rows = [untold(s) for s in able]
        self.trying = False
        step = float(cost.steps(np.array([len(sequences)]), context)[0])
        if self._tried < TRIALS or len(self._all.rounds) < BLOCKS:
            chosen = _affordable(set(), range(len(able)), records, rows, cost, step, BLOCKS)
        else:
            # Nothing was learned since it did not pay for the same requests, nor told of one: it would not now.
            key = (*(self._record(s).number for s in sequences), *(n == 0 for n in rows))
            chosen = set()
            if able and key != self._not_paying:
                chosen = self._paying(able, records, rows, len(sequences), cost, context)
                new = [i for i, s in enumerate(able) if records[i].blocks < BLOCKS and self._knows_little(s)]
                new = [i for i in new if i not in chosen]
                chosen |= _affordable(chosen, new, records, rows, cost, step, BLOCKS)
            self._not_paying = key if not chosen else None
            self._try_again(chosen, records, rows, cost, step)
        for i, record in enumerate(records):
            record.idle = 0 if i in chosen else record.idle + 1
        drafted = [able[i] for i in sorted(chosen)]
        taken = set(map(id, drafted))
        return drafted, [s for s in sequences if id(s) not in taken]

    def observe(self, sequences: list[Sequence], proposal: Proposal, verified: list[int], accepted: list[int]) -> None:
        """Learns from a round: its proposal, whose requests come first in `verified` and `accepted` tokens."""
        self._tried += 1
        self._not_paying = None
        there = torch.arange(proposal.tokens.shape[1]) < proposal.counts[:, None]
        # A single NaN would stay in the sums of all texts for ever.
        survival = (proposal.on_host[1].double() * there).cumprod(1).numpy()
        for s, row, length, kept in zip(sequences, survival, verified, accepted, strict=False):
            record = self._record(s)
            record.add(row, length, kept, 0.8)
            self._heard[s.metrics.draft] += record.blocks == 1
            if record.blocks == BLOCKS:
                self._texts.setdefault(s.metrics.draft, collections.deque(maxlen=TEXTS)).append(record)
            self._all.add(row, length, kept, 0.98)
            pool = self._of_draft.setdefault(s.metrics.draft, _Record(collections.deque(maxlen=4 * WINDOW)))
            pool.add(row, length, kept, 0.98)

    def _record(self, sequence: Sequence) -> _Record:
        record = self._records.get(sequence)
        if record is None:
            record = _Record(collections.deque(maxlen=WINDOW), number=next(self._numbers))
            self._records[sequence] = record
        return record

    def _known_texts(self, sequence: Sequence) -> list[_Record]:
        """The latest texts of a request's draft, none where they are too few to say what texts are like."""
        texts = list(self._texts.get(sequence.metrics.draft, ()))
        return texts if len(texts) >= FEW_TEXTS else []

    def _knows_little(self, sequence: Sequence) -> bool:
        """Whether the draft met too few texts to judge a new one by others: long ones, or twice as many of any."""
        return not self._known_texts(sequence) and self._heard[sequence.metrics.draft] < 2 * FEW_TEXTS

    def _try_again(
        self, chosen: set[int], records: list[_Record], rows: list[int], cost: StepCost, step: float
    ) -> None:
        """Adds to `chosen` some of those that have paused long enough. step: seconds of the step without drafts."""
        due: list[int] = []
        if chosen:
            self._all.idle, self._all.pause = 0, max(self._all.pause // 2, FIRST_PAUSE)
            for i, record in enumerate(records):
                if i in chosen:
                    record.pause = FIRST_PAUSE
                elif record.idle >= record.pause:
                    due.append(i)
        elif records and self._all.idle >= self._all.pause:
            self.trying = True
            self._all.idle = 0
            self._all.lengthen_pause()
            due += range(len(records))
        else:
            self._all.idle += 1
        again = _affordable(chosen, due, records, rows, cost, step, 1)
        for i in again:
            records[i].retry()
        chosen |= again

    def _paying(
        self,
        able: list[Sequence],
        records: list[_Record],
        rows: list[int],
        requests: int,
        cost: StepCost,
        context: int,
    ) -> set[int]:
        """Indices of those that drafting is expected to pay for, the best of them first come."""
        prior = self._all.reliability(1.0)
        values: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        gains: list[float] = []
        for s, record in zip(able, records, strict=True):
            if record.blocks < BLOCKS and (texts := self._known_texts(s)):
                promised = sorted((_survival(list(t.rounds), t.reliability(prior)) for t in texts), key=_gain)
                survival = _survival([row for one in promised[-max(1, len(texts) // 4) :] for row in one], 1.0)
            else:
                rounds = list(record.rounds)
                if len(rounds) < BLOCKS:
                    others = self._of_draft.get(s.metrics.draft, self._all).rounds
                    rounds += list(others)[len(rounds) - BLOCKS :]
                survival = _survival(rounds, record.reliability(prior))
            survival = survival[:, : s.draft_limit]
            values.append(survival.ravel())
            weights.append(np.full(survival.size, 1 / len(survival)))
            gains.append(_gain(survival))
        rank = np.empty(len(able), dtype=np.int64)
        best_first = sorted(range(len(able)), key=lambda i: -gains[i])
        rank[best_first] = np.arange(len(able))
        owner = np.repeat(rank, [v.size for v in values])
        value, weight = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(-value)
        owner, value, weight = owner[order], value[order], weight[order]
        best, best_rate = 0, MARGIN * requests / float(cost.steps(np.array([requests]), context)[0])
        n = len(able)
        for d in range(1, n + 1) if n <= 8 else (n // 4, n // 2, 3 * n // 4, n):
            mine = owner < d
            emitted = requests + np.cumsum(value[mine] * weight[mine])
            tokens = requests + np.cumsum(weight[mine])
            # Each round tells of what the one before emitted; what is untold beyond that is paid once.
            again = d + round(sum(gains[i] for i in best_first[:d]))
            draft = cost.draft_seconds(d, again)
            once = cost.draft_seconds(d, max(again, sum(rows[i] for i in best_first[:d]))) - draft
            draft += once / WINDOW
            rate = float((emitted / (cost.steps(tokens, context) + draft)).max())
            if rate > best_rate:
                best, best_rate = d, rate
        return set(best_first[:best])


def _affordable(
    chosen: set[int],
    more: Iterable[int],
    records: list[_Record],
    rows: list[int],
    cost: StepCost,
    step: float,
    least: int,
) -> set[int]:
    """Of `more` requests, those to draft for to learn, the longest idle first, beside those `chosen` anyway.

    Args:
        rows: what the draft has to be told of each request. step: seconds of the step without drafts.
        least: taken whatever they cost, and no more while nobody knows what that is.
    """
    in_turn = sorted(more, key=lambda i: -records[i].idle)
    if len(in_turn) <= least or cost.draft_seconds(1) == 0:
        return set(in_turn[:least])
    already, told = len(chosen), sum(rows[i] for i in chosen)
    base = cost.draft_seconds(already, told)

    def added(count: int) -> float:
        return cost.draft_seconds(already + count, told + sum(rows[i] for i in in_turn[:count])) - base

    most = max(TRY_SHARE * step, ALIKE * added(1))
    count = least
    while count < len(in_turn) and added(count + 1) <= most:
        count += 1
    return set(in_turn[:count])


def _survival(rounds: list[np.ndarray], reliability: float) -> np.ndarray:
    """float64[n, K] of n rounds, scaled; drafts may have blocks of several sizes."""
    survival = np.zeros((len(rounds), max(map(len, rounds))))
    for row, seen in zip(survival, rounds, strict=True):
        row[: len(seen)] = seen
    return np.minimum(survival * reliability, 1.0)


def _gain(survival: np.ndarray) -> float:
    """Expected accepted tokens of a round, if all are verified."""
    return float(survival.sum()) / len(survival)
