"""Bias and penalties: what a request does to the target's logits before temperature, at every draft position exactly as
plain decoding would do it there: the tokens proposed before it in the same block count as said.

Order and meaning are those of the usual servers: bias; repetition penalty over prompt and answer (a positive logit is
divided by it, a negative one multiplied); frequency and presence penalties over the answer. Few tokens of a vocabulary
are touched, so that the logits stay as they are: `verify` reads a touched token's logit from a short list instead.

Letters: B requests, T rows of logits, V target vocabulary in C blocks of BLOCK ids, E touched tokens of all requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


def touched(
    adjustment: Adjustment,
    *,
    prompt: Sequence[int],
    answer: Sequence[int],
    proposed: Sequence[int],
    vocabulary: int,
) -> Touched:
    """What `adjustment` touches in the rows after `answer` and after each of the `proposed` tokens behind it.

    Args:
        prompt, answer, proposed: target ids. vocabulary: V.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    before = prompt if adjustment.repetition != 1.0 else ()
    said, block = (answer, proposed) if adjustment.penalises else ((), ())
    everything = torch.tensor([*adjustment.bias, *before, *said, *block], dtype=torch.int64)
    outside = (everything < 0) | (everything >= vocabulary)
    if bool(outside.any()):
        raise ValueError(f"token {int(everything[outside][0])} is outside the target vocabulary of {vocabulary}")
    columns, place = everything.unique(return_inverse=True)
    biased, of_prompt, of_answer, later = place.split([len(adjustment.bias), len(before), len(said), len(block)])
    bias = torch.zeros(len(columns))
    bias[biased] = torch.tensor(list(adjustment.bias.values()), dtype=torch.float32)
    prompted = torch.zeros(len(columns), dtype=torch.bool)
    prompted[of_prompt] = True
    counts = torch.bincount(of_answer, minlength=len(columns)).to(torch.float32)
    return Touched(adjustment, columns, bias, counts, prompted, later)


@dataclass(frozen=True)
class Overrides:
    """New values for some of the logits of a step: which, and what they are worked out of.

    Attributes:
        columns: int32 [E] ids of the touched tokens, ascending in each request.
        bounds: int32 [B, C + 1] where each request's entries of each block of ids begin; all the same in a request
            that has none.
        bias, counts: float32 [E], prompted: bool [E]: see `Touched`.
        penalties: float32 [B, 3] repetition, frequency, presence.
        owner: int64 [T] each row's request. at: int64 [T] where each row's values begin: one after the other, each
            has one for every entry of its request.
        again: int64 [A] values whose token is proposed before their row in the block, once for every time.
        size: how many values there are.
    """

    columns: Tensor
    bounds: Tensor
    bias: Tensor
    counts: Tensor
    prompted: Tensor
    penalties: Tensor
    owner: Tensor
    at: Tensor
    again: Tensor
    size: int

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
        if not any(one is not None and len(one.columns) for one in requests):
            return None
        none = torch.zeros(0, dtype=torch.int64)
        nothing = Touched(Adjustment(), none, torch.zeros(0), torch.zeros(0), none.to(torch.bool), none)
        edges = torch.arange(-(-vocabulary // BLOCK) + 1) * BLOCK
        bounds, at, again = [], [], []
        first = size = 0
        parts = [nothing if one is None else one for one in requests]
        for number, (one, count) in enumerate(zip(parts, rows, strict=True)):
            width = len(one.columns)
            if one.adjustment.penalises and len(one.proposed) != count - 1:
                raise ValueError(f"request {number} has {count} rows for {len(one.proposed)} proposed tokens")
            bounds.append(first + torch.searchsorted(one.columns, edges))
            at.append(size + torch.arange(count) * width)
            earlier, later = torch.ones(len(one.proposed), len(one.proposed)).triu().nonzero(as_tuple=True)
            again.append(size + (later + 1) * width + one.proposed[earlier])
            first += width
            size += count * width
        penalties = [(a.repetition, a.frequency, a.presence) for a in (one.adjustment for one in parts)]
        whose = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(list(rows)))
        made = {
            "columns": torch.cat([one.columns for one in parts]).to(torch.int32),
            "bounds": torch.stack(bounds).to(torch.int32),
            "bias": torch.cat([one.bias for one in parts]),
            "counts": torch.cat([one.counts for one in parts]),
            "prompted": torch.cat([one.prompted for one in parts]),
            "penalties": torch.tensor(penalties, dtype=torch.float32),
            "owner": whose,
            "at": torch.cat(at),
            "again": torch.cat(again),
        }
        return cls(**dict(zip(made, at_once(list(made.values()), device), strict=True)), size=size)

    def check(self, batch: int, rows: int, vocabulary: int, device: torch.device) -> None:
        """Raises ValueError, naming the field, unless they are of `batch` requests with `rows` rows over the vocabulary
        on `device`. Values are not looked at."""
        entries, real = self.columns.shape[:1].numel(), torch.float32
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "columns": (torch.int32, (entries,)),
            "bounds": (torch.int32, (batch, -(-vocabulary // BLOCK) + 1)),
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

    def values(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new logits float32 [size], and whose they are: row and column, int64 [size].

        Args:
            logits: [T, V], any floating dtype.
        """
        device = logits.device
        first = self.bounds[:, 0].to(torch.int64)
        counts = (self.bounds[:, -1] - first)[self.owner]
        row = torch.repeat_interleave(torch.arange(len(self.at), device=device), counts, output_size=self.size)
        request = self.owner[row]
        entry = torch.arange(self.size, device=device) - self.at[row] + first[request]
        column = self.columns[entry].to(torch.int64)
        repetition, frequency, presence = self.penalties[request].unbind(-1)
        said = self.counts[entry].index_add(0, self.again, torch.ones(1, device=device).expand(len(self.again)))
        # In float32: a logit of 25 in bfloat16 is 0.125 from the next, so that most penalties would round to nothing.
        z = logits[row, column].to(torch.float32) + self.bias[entry]
        repeated = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where((said > 0) | self.prompted[entry], repeated, z)
        return z - frequency * said - presence * (said > 0), row, column
