"""Bias and penalties: what a request does to the target's logits before temperature, at every draft position exactly as
plain decoding would do it there: the tokens proposed before it in the same block count as said.

Order and meaning are those of the usual servers: bias; repetition penalty over prompt and answer (a positive logit is
divided by it, a negative one multiplied); frequency and presence penalties over the answer. Few tokens of a vocabulary
are touched, so that the logits stay as they are: `verify` reads a touched token's logit from a short list instead.

A request's tokens are listed once, when it begins, and added to as it speaks (`Said`); a step adds what it proposes.

Letters: B requests, of which A ask for something, T rows of logits, V target vocabulary in C blocks of BLOCK ids, E
touched tokens of all requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .sampling import BLOCK
from .transfer import at_once


@dataclass(frozen=True)
class Adjustment:
    """Of one request.

    Attributes:
        repetition: 1 is off. presence, frequency: 0 is off.
        bias: added to the logits of single tokens.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def neutral(self) -> bool:
        """Nothing to do."""
        return not self.bias and not self.penalises

    @property
    def penalises(self) -> bool:
        """It matters what was said."""
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0


_NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Touched:
    """The tokens of one request whose logits change, at one row or another. On the CPU.

    Attributes:
        adjustment: what the request asks for.
        columns: int64 [n] their ids, ascending.
        bias: float32 [n]. counts: float32 [n], how often the answer before the block has each. prompted: bool [n],
            whether the prompt has it.
        proposed: int64 [k] places in `columns` of the block's tokens, as many as count in its later rows.
    """

    adjustment: Adjustment
    columns: Tensor
    bias: Tensor
    counts: Tensor
    prompted: Tensor
    proposed: Tensor


class Said:
    """What the text of one request has of tokens so far: kept with the request, which only ever says more.

    Args:
        adjustment: what the request asks for. prompt: target ids. vocabulary: V.
    Attributes:
        answered: so many tokens of the answer are counted.

    Raises:
        ValueError: an id outside the vocabulary; `add` and `touched` raise it too.
    """

    def __init__(self, adjustment: Adjustment, prompt: Sequence[int], vocabulary: int) -> None:
        self.answered = 0
        self._vocabulary = vocabulary
        before = prompt if adjustment.repetition != 1.0 else ()
        columns, place = self._ids([*adjustment.bias, *before]).unique(return_inverse=True)
        biased, of_prompt = place.split([len(adjustment.bias), len(before)])
        bias = torch.zeros(len(columns))
        bias[biased] = torch.tensor(list(adjustment.bias.values()), dtype=torch.float32)
        prompted = torch.zeros(len(columns), dtype=torch.bool)
        prompted[of_prompt] = True
        self._now = Touched(adjustment, columns, bias, torch.zeros(len(columns)), prompted, _NOTHING)

    def add(self, answer: Sequence[int]) -> None:
        """Counts what was said since."""
        self.answered += len(answer)
        if answer and self._now.adjustment.penalises:
            now = self._with(answer)
            counts = now.counts.index_add(0, now.proposed, torch.ones(len(answer)))
            self._now = replace(now, counts=counts, proposed=_NOTHING)

    def touched(self, proposed: Sequence[int]) -> Touched:
        """What is touched in the rows behind the text so far and behind each of the `proposed` tokens after it. It
        stays as it is when more is said."""
        return self._with(proposed) if proposed and self._now.adjustment.penalises else self._now

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(tokens, dtype=torch.int64)
        outside = (ids < 0) | (ids >= self._vocabulary)
        if bool(outside.any()):
            raise ValueError(f"token {int(ids[outside][0])} is outside the target vocabulary of {self._vocabulary}")
        return ids

    def _with(self, tokens: Sequence[int]) -> Touched:
        """What is touched so far and `tokens`, whose places are its `proposed`."""
        now, ids = self._now, self._ids(tokens)
        place = torch.searchsorted(now.columns, ids)
        lacking = torch.ones(len(ids), dtype=torch.bool)
        if len(now.columns):
            lacking = now.columns[place.clamp(max=len(now.columns) - 1)] != ids
        fresh = ids[lacking].unique()
        if not len(fresh):
            return replace(now, proposed=place)
        at = torch.searchsorted(now.columns, fresh) + torch.arange(len(fresh))
        kept = torch.ones(len(now.columns) + len(fresh), dtype=torch.bool)
        kept[at] = False

        def among(values: Tensor) -> Tensor:
            """Of the old columns, 0 of the fresh ones."""
            return values.new_zeros(len(kept)).masked_scatter_(kept, values)

        columns = among(now.columns).index_copy_(0, at, fresh)
        rest = (among(now.bias), among(now.counts), among(now.prompted))
        return Touched(now.adjustment, columns, *rest, torch.searchsorted(columns, ids))


def touched(
    adjustment: Adjustment,
    *,
    prompt: Sequence[int],
    answer: Sequence[int],
    proposed: Sequence[int],
    vocabulary: int,
) -> Touched:
    """What `adjustment` touches in the rows after `answer` and after each of the `proposed` tokens behind it: of a text
    that is listed once. For one that grows there is `Said`.

    Args:
        prompt, answer, proposed: target ids. vocabulary: V.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    said = Said(adjustment, prompt, vocabulary)
    said.add(answer)
    return said.touched(proposed)


@dataclass(frozen=True)
class Overrides:
    """New values for some of the logits of a step: which, and what they are worked out of.

    Attributes:
        columns: int32 [E] ids of the touched tokens, ascending in each request.
        bounds: int32 [B, C + 1] where each request's entries of each block of ids begin; all the same in a request
            that has none.
        lines: int64 [B] each request's line in the map (`entries`), -1 where it has none, as it has no entries.
        bias, counts: float32 [E], prompted: bool [E]: see `Touched`.
        penalties: float32 [B, 3] repetition, frequency, presence.
        owner: int64 [T] each row's request. at: int64 [T] where each row's values begin: one after the other, each
            has one for every entry of its request.
        again: int64 [N] values whose token is proposed before their row in the block, once for every time.
        size: how many values there are. asking: A.
    """

    columns: Tensor
    bounds: Tensor
    lines: Tensor
    bias: Tensor
    counts: Tensor
    prompted: Tensor
    penalties: Tensor
    owner: Tensor
    at: Tensor
    again: Tensor
    size: int
    asking: int

    @classmethod
    def of(
        cls,
        requests: Sequence[Touched | None],
        rows: Sequence[int],
        vocabulary: int,
        device: torch.device | str = "cpu",
    ) -> Overrides | None:
        """Of a step's requests, in order; None where no logit changes. Nothing waits for the device.

        Args:
            requests: what each touches, None: nothing. rows: how many rows of logits each has.

        Raises:
            ValueError: a request's rows aren't as many as its proposed tokens and one more.
        """
        for number, (one, count) in enumerate(zip(requests, rows, strict=True)):
            if one is not None and one.adjustment.penalises and len(one.proposed) != count - 1:
                raise ValueError(f"request {number} has {count} rows for {len(one.proposed)} proposed tokens")
        asking = [number for number, one in enumerate(requests) if one is not None and len(one.columns)]
        if not asking:
            return None
        parts = [one for one in requests if one is not None and len(one.columns)]
        widths = torch.zeros(len(requests), dtype=torch.int64)
        widths[asking] = torch.tensor([len(one.columns) for one in parts])
        edges = torch.arange(-(-vocabulary // BLOCK) + 1) * BLOCK
        bounds = (widths.cumsum(0) - widths)[:, None].repeat(1, len(edges))
        bounds[asking] += torch.stack([torch.searchsorted(one.columns, edges) for one in parts])
        lines = torch.full_like(widths, -1)
        lines[asking] = torch.arange(len(asking))
        penalties = torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(requests), 1)
        penalties[asking] = torch.tensor(
            [(a.repetition, a.frequency, a.presence) for a in (one.adjustment for one in parts)], dtype=torch.float32
        )
        counts = torch.tensor(list(rows))
        sizes = widths * counts
        owner, number_of = _each(counts)
        at = (sizes.cumsum(0) - sizes)[owner] + widths[owner] * number_of
        # Every proposed token counts in the rows behind it, up to its request's last.
        blocks = torch.tensor([len(one.proposed) for one in parts])
        line, index = _each(blocks)
        token, ahead = _each(blocks[line] - index)
        row = (counts.cumsum(0) - counts)[asking][line[token]] + index[token] + 1 + ahead
        made = {
            "columns": torch.cat([one.columns for one in parts]).to(torch.int32),
            "bounds": bounds.to(torch.int32),
            "lines": lines,
            "bias": torch.cat([one.bias for one in parts]),
            "counts": torch.cat([one.counts for one in parts]),
            "prompted": torch.cat([one.prompted for one in parts]),
            "penalties": penalties,
            "owner": owner,
            "at": at,
            "again": at[row] + torch.cat([one.proposed for one in parts])[token],
        }
        there = dict(zip(made, at_once(list(made.values()), device), strict=True))
        return cls(**there, size=int(sizes.sum()), asking=len(asking))

    def check(self, batch: int, rows: int, vocabulary: int, device: torch.device) -> None:
        """Raises ValueError, naming the field, unless they are of `batch` requests with `rows` rows over the vocabulary
        on `device`. Values are not looked at."""
        entries, real = self.columns.numel(), torch.float32
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "columns": (torch.int32, (entries,)),
            "bounds": (torch.int32, (batch, -(-vocabulary // BLOCK) + 1)),
            "lines": (torch.int64, (batch,)),
            "bias": (real, (entries,)),
            "counts": (real, (entries,)),
            "prompted": (torch.bool, (entries,)),
            "penalties": (real, (batch, 3)),
            "owner": (torch.int64, (rows,)),
            "at": (torch.int64, (rows,)),
            "again": (torch.int64, (self.again.numel(),)),
        }
        for name, (dtype, shape) in wanted.items():
            value = getattr(self, name)
            if value.dtype != dtype or value.shape != shape or value.device != device:
                raise ValueError(
                    f"overrides.{name} is {value.dtype} {list(value.shape)} on {value.device}; expected {dtype} "
                    f"{list(shape)} on {device}"
                )

    def entries(self, vocabulary: int) -> Tensor:
        """The map int16 [A, V]: which entry of its block an id is, counted from 1 (a block has BLOCK at most); 0: none.
        A line is shared by its request's rows. Nothing waits for the device."""
        device = self.columns.device
        counts = self.bounds[:, -1] - self.bounds[:, 0]
        request = torch.repeat_interleave(counts, output_size=len(self.columns))
        column = self.columns.to(torch.int64)
        place = torch.arange(1, len(column) + 1, device=device) - self.bounds[request, column // BLOCK]
        cells = self.lines[request] * vocabulary + column
        found = torch.zeros(self.asking * vocabulary, dtype=torch.int16, device=device)
        return found.scatter_(0, cells, place.to(torch.int16)).view(self.asking, vocabulary)

    def values(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new logits float32 [size], and whose they are: row and column, integers [size].

        Args:
            logits: [T, V], any floating dtype.
        """
        device = logits.device
        # Half the memory traffic wherever 32 bits can tell all values apart.
        whole = torch.int32 if self.size < 2**31 else torch.int64
        first = self.bounds[:, 0]
        owner = self.owner.to(whole)
        counts = (self.bounds[:, -1] - first).to(whole)[self.owner]
        row = torch.repeat_interleave(counts, output_size=self.size)
        request = owner.index_select(0, row)
        shift = first.to(whole)[self.owner] - self.at.to(whole)
        entry = torch.arange(self.size, dtype=whole, device=device) + shift.index_select(0, row)
        column = self.columns.index_select(0, entry)
        repetition, frequency, presence = self.penalties.index_select(0, request).unbind(-1)
        ones = torch.ones(1, device=device).expand(len(self.again))
        said = self.counts.index_select(0, entry).index_add(0, self.again, ones)
        # In float32: a logit of 25 in bfloat16 is 0.125 from the next, so that most penalties would round to nothing.
        z = logits[row, column].to(torch.float32) + self.bias.index_select(0, entry)
        repeated = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where((said > 0) | self.prompted.index_select(0, entry), repeated, z)
        return z - frequency * said - presence * (said > 0), row, column


def _each(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of N items, each there `counts` int64 [N] times, side by side: which item each is, and its number among the same
    ones, from 0: int64 [sum of counts]."""
    item = torch.repeat_interleave(counts)
    return item, torch.arange(len(item)) - (counts.cumsum(0) - counts)[item]
