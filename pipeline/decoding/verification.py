"""A step's verification: every request's rows sampled, with its bias and penalties, and compared with its proposal;
log-probabilities.

Letters: B requests (those that decode, then those whose prompt just ended), T rows, K block size, V target vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import logging

import torch
from torch import Tensor

from draftline_kernels import Overrides, Said, Sampling, Touched, at_once, verify
from pipeline.decoding.plan import StepPlan
from pipeline.decoding.request import TokenLogprob

log = logging.getLogger(__name__)


class Verification:
    """Decides what the requests of a step emit.

    Args:
        plan: of the step; its B requests to verify, of which the first ones have a proposal, if there is one. One whose
            rows can't be adjusted gets its `failure` set, and its part of the result means nothing.
        logits: [T, V], lengths + 1 rows per request, 1 where the prompt just ended. They stay as they are.
        rule: coupled or ratio.
    Attributes:
        result: see `draftline_kernels.VerifyResult`.
    """

    def __init__(self, plan: StepPlan, logits: Tensor, rule: str) -> None:
        device, proposal = logits.device, plan.proposal
        self._plan, self._logits = plan, logits
        self._sequences = sequences = [s for s, _ in plan.verifying]
        asked = (s.request for s in sequences)
        sampling = Sampling.of([(r.temperature, r.top_k, r.top_p, r.seed, r.min_p) for r in asked], device)
        draft_logits = None
        if proposal is None:
            tokens = torch.zeros(len(sequences), 0, dtype=torch.int64, device=device)
        else:
            tokens = _of_all(proposal.tokens, len(sequences), torch.int64, device)
            if proposal.logits is not None and rule == "ratio":
                # fp32 whatever the target's dtype: q must be what the tokens were drawn from.
                draft_logits = _of_all(proposal.logits, len(sequences), torch.float32, device)
        positions = [len(s.tokens) - 1 for s in sequences]
        overrides = None
        if plan.ahead is None:
            rows = self._rows
            counted = [positions, [n - 1 for n in rows], self._starts]
            adjusted = [self._touched(plan, i, logits.shape[1]) for i in range(len(sequences))]
            overrides = Overrides.of(adjusted, rows, logits.shape[1], device)
        else:
            counted = [positions]
        at, *there = at_once([torch.tensor(c, dtype=torch.int64) for c in counted], device)
        if plan.ahead is None:
            lengths, starts = there
        else:
            lengths = plan.ahead.lengths
            starts = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
        self.result = verify(
            logits,
            tokens,
            lengths,
            starts,
            sampling,
            at,
            rule=rule,
            draft_logits=draft_logits,
            d2t=None if proposal is None else proposal.d2t,
            overrides=overrides,
        )

    @functools.cached_property
    def _rows(self) -> list[int]:
        """Of each request. Raises RuntimeError where the plan doesn't know its blocks yet."""
        lengths = self._plan.lengths
        if len(lengths) < len(self._plan.decoding):
            raise RuntimeError("the step ran ahead and has not been read yet")
        return [n + 1 for n in lengths] + [1] * (len(self._sequences) - len(lengths))

    @functools.cached_property
    def _starts(self) -> list[int]:
        """First row of each request, and T."""
        return [0, *itertools.accumulate(self._rows)]

    def logprobs(self, index: int, emitted: list[int]) -> list[TokenLogprob] | None:
        """Of the tokens that request `index` emitted; None where it did not ask."""
        wanted = self._sequences[index].request.logprobs
        if wanted is None:
            return None
        first = self._starts[index]
        logs = self._logits[first : first + len(emitted)].float().log_softmax(-1)
        (tokens,) = at_once([torch.tensor(emitted, dtype=torch.int64)], logs.device)
        best = logs.topk(wanted)
        # One read for all of it: float64 holds ids and float32 alike.
        own = logs.gather(-1, tokens[:, None])
        rows = torch.cat((own.double(), best.values.double(), best.indices.double()), -1).tolist()
        out = []
        for token, (said, *rest) in zip(emitted, rows, strict=True):
            ids = [int(i) for i in rest[wanted:]]
            out.append(TokenLogprob(token, said, list(zip(ids, rest[:wanted], strict=True))))
        return out

    def _touched(self, plan: StepPlan, index: int, vocabulary: int) -> Touched | None:
        """What request `index` does to its logits; None: nothing, or it failed at it."""
        s, first = plan.verifying[index]
        if s.adjustment is None:
            return None
        rows = self._starts[index + 1] - self._starts[index]
        try:
            if s.said is None:
                s.said = Said(s.adjustment, s.request.prompt_ids, vocabulary)
            s.said.add(s.tokens[s.prompt_length + s.said.answered :])
            # From the plan: the proposal's own tokens are on the device.
            return s.said.touched(plan.tokens[first + 1 : first + rows])
        except Exception as e:  # what one request asks for must not end the others'
            log.exception("The logits of request %s could not be adjusted", s.request.id)
            s.failure = f"its logits could not be adjusted: {type(e).__name__} after {len(s.output)} tokens: {e}"
            return None


def _of_all(drafted: Tensor, requests: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, ...], contiguous, of what [<= B, ...] was drafted, zeros behind it: itself where it is that already."""
    if len(drafted) == requests and drafted.dtype == dtype and drafted.device == device and drafted.is_contiguous():
        return drafted
    out = torch.zeros(requests, *drafted.shape[1:], dtype=dtype, device=device)
    out[: len(drafted)] = drafted
    return out
