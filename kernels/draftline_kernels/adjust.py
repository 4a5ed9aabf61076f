"""What a request does to the target's logits before temperature: bias, penalties, min-p. At every draft position
exactly as plain decoding would do it there: the tokens proposed before it in the same block count as said.

Order and meaning are those of the usual servers: bias; repetition penalty over prompt and answer (a positive logit is
divided by it, a negative one multiplied); frequency and presence penalties over the answer; min-p on what the
temperature makes of the result. Letters: n verification rows of one request, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adjustment:
    """Of one request.

    Attributes:
        repetition: 1 is off. presence, frequency: 0 is off.
        min_p: least probability, as a share of the likeliest token's; 0 is off. Greedy decoding ignores it.
        bias: added to the logits of single tokens.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    min_p: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def neutral(self) -> bool:
        """Nothing to do."""
        return self == Adjustment()


def adjust_(
    logits: Tensor,
    adjustment: Adjustment,
    *,
    prompt: Sequence[int],
    answer: Sequence[int],
    proposed: Sequence[int],
    temperature: float,
) -> None:
    """Adjusts a request's rows in place.

    Args:
        logits: float32 [n, V]; row i scores the token after `answer` and the first i proposed ones.
        prompt, answer: target ids of the text so far. proposed: at least n - 1 target ids.
        temperature: 0 is greedy.

    Raises:
        ValueError: logits of another dtype.
    """
    if logits.dtype != torch.float32:
        # A logit of 25 in bfloat16 is 0.125 from the next: most penalties would round to nothing.
        raise ValueError(f"logits are {logits.dtype}; expected float32: call .float() on them first")
    rows, device = logits.shape[0], logits.device
    if adjustment.bias:
        ids = torch.tensor(list(adjustment.bias), device=device)
        logits[:, ids] += torch.tensor(list(adjustment.bias.values()), dtype=torch.float32, device=device)
    if adjustment.repetition != 1.0 or adjustment.presence or adjustment.frequency:
        _penalise(logits, adjustment, prompt, answer, list(proposed[: rows - 1]))
    if adjustment.min_p > 0 and temperature > 0:
        # probability >= min_p * largest, in logits: no less than T * log(1 / min_p) under the largest.
        floor = logits.amax(-1, keepdim=True) + temperature * math.log(adjustment.min_p)
        logits.masked_fill_(logits < floor, float("-inf"))


def _penalise(
    logits: Tensor, adjustment: Adjustment, prompt: Sequence[int], answer: Sequence[int], proposed: list[int]
) -> None:
    rows, device = logits.shape[0], logits.device
    said = torch.tensor([*answer, *proposed], dtype=torch.int64)
    everything = torch.cat((torch.tensor(list(prompt), dtype=torch.int64), said))
    tokens, place = everything.unique(return_inverse=True)
    in_prompt = torch.zeros(len(tokens), dtype=torch.bool)
    in_prompt[place[: len(prompt)]] = True
    counts = torch.zeros(rows, len(tokens))
    counts[0] = torch.bincount(place[len(prompt) : len(prompt) + len(answer)], minlength=len(tokens))
    for i in range(1, rows):
        counts[i] = counts[i - 1]
        counts[i, place[len(prompt) + len(answer) + i - 1]] += 1
    tokens, counts, in_prompt = tokens.to(device), counts.to(device), in_prompt.to(device)
    z = logits[:, tokens]
    if adjustment.repetition != 1.0:
        r = adjustment.repetition
        z = torch.where((counts > 0) | in_prompt, torch.where(z > 0, z / r, z * r), z)
    z = z - adjustment.frequency * counts - adjustment.presence * (counts > 0)
    logits[:, tokens] = z
