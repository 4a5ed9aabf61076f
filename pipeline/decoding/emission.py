"""What a step emits: the verified tokens of each request up to its first stop, why it ends, and what was learned.

One request's fault (logits that are not finite or can't be adjusted, a text that can't be told) ends that request with
its cause, never the step.
"""

from __future__ import annotations

import dataclasses
import logging
import time

import torch

from pipeline.decoding.plan import StepPlan
from pipeline.decoding.proposers.base import Commit
from pipeline.decoding.request import Completion, Sequence, StepEvent, TokenLogprob
from pipeline.decoding.verification import Verification

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Emission:
    """What one request gets of a step. reason: why it ends (see Completion), None if it goes on."""

    sequence: Sequence
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str | None = None
    logprobs: list[TokenLogprob] | None = None

    def event(self) -> StepEvent:
        """The event that tells it, with the request's completion where it ends."""
        s = self.sequence
        done = None if self.reason is None else _completion(s, self.reason)
        return StepEvent(s.request.id, self.tokens, done, self.logprobs)


@dataclasses.dataclass(frozen=True)
class RoundTrace:
    """What happened to the blocks of one step (given to `Engine.on_round`).

    request_ids of the B requests drafted for; raw_confidence float32[B, K] or None; lengths, accepted, emitted:
    int64[B]. Where the text ended inside the block, fewer than accepted + 1 tokens are emitted.
    """

    request_ids: list[str]
    raw_confidence: torch.Tensor | None
    lengths: torch.Tensor
    accepted: torch.Tensor
    emitted: torch.Tensor

    @classmethod
    def of(cls, plan: StepPlan, accepted: list[int], emitted: list[Emission]) -> RoundTrace:
        """Of a step that had a proposal; `accepted` and `emitted` of all its verified requests."""
        assert plan.proposal is not None
        drafted, raw = plan.drafted, plan.proposal.raw_confidence
        return cls(
            [s.request.id for s in plan.decoding[:drafted]],
            # A copy: the next step of its recording writes over it.
            None if raw is None else raw.to("cpu", copy=True),
            torch.tensor(plan.lengths[:drafted]),
            torch.tensor(accepted[:drafted]),
            torch.tensor([len(e.tokens) for e in emitted[:drafted]]),
        )


def emissions(plan: StepPlan, step: Verification) -> tuple[list[Emission], list[Commit], list[int]]:
    """Takes a verified step into the texts and metrics of its requests; `plan.outcome` is filled.

    Returns:
        what each request of `plan.verifying` emits; the positions of blocks that became part of a text, in order; and
        the accepted draft tokens of each.
    """
    accepted, following, finite = _read(plan, step)
    commits: list[Commit] = []
    emitted = [
        _emit(plan, step, i, accepted[i], following[i] if finite[i] else None, commits)
        for i in range(len(plan.verifying))
    ]
    return emitted, commits, accepted


def unsound_prompts(plan: StepPlan, unsound: set[int]) -> list[Sequence]:
    """Requests whose prompts became NaN before their last chunk, which is the first that is verified, with their
    `failure` set: until then their pages would make others' steps run twice, and their taps others' drafts worthless.

    Args:
        unsound: segments of the step whose hidden states are not finite.
    """
    verified = {id(s) for s, _ in plan.verifying}
    found = []
    for i, c in enumerate(plan.chunks, len(plan.decoding)):
        if i in unsound and id(c.sequence) not in verified:
            last = c.start + c.rows.stop - c.rows.start - 1
            c.sequence.failure = (
                f"the target's hidden states at positions {c.start} to {last} of its prompt are not finite. Check the "
                "target's weights and dtype."
            )
            found.append(c.sequence)
    return found


def _read(plan: StepPlan, step: Verification) -> tuple[list[int], list[int], list[int]]:
    """accepted, next_token and finite of the step; of one that ran ahead what was drafted and verified too, which the
    plan then knows. One read: each would wait for the device."""
    result = step.result
    decided = torch.stack((result.accepted, result.next_token, result.finite.long()), 1)
    if plan.ahead is not None and plan.proposal is not None:
        packed = plan.proposal.packed()
        packed = torch.nn.functional.pad(packed, (0, 0, 0, len(decided) - len(packed)))
        rows = torch.cat((packed, plan.ahead.lengths[:, None], decided), 1).tolist()
        plan.proposal.read([row[:-4] for row in rows[: plan.drafted]])
        plan.known([row[-4] for row in rows])
        decided_rows = [row[-3:] for row in rows]
    else:
        decided_rows = decided.tolist()
    accepted, following, finite = (list(column) for column in zip(*decided_rows, strict=True))
    return accepted, following, finite


def _emit(
    plan: StepPlan, step: Verification, i: int, accepted: int, following: int | None, commits: list[Commit]
) -> Emission:
    """following: the token after the accepted ones; None: logits that are not finite."""
    s, first = plan.verifying[i]
    if s.failure:
        return Emission(s, reason="error")
    if following is None:
        s.failure = (
            f"the target's logits at position {len(s.tokens)} are not finite (after {len(s.output)} tokens, step "
            f"{s.metrics.target_steps}). Check the target's weights and dtype."
        )
        return Emission(s, reason="error")
    # From the plan: the proposal's own tokens are on the device, and each look there would wait for it.
    draft = plan.tokens[first + 1 : first + 1 + accepted] if first >= 0 else []
    if plan.proposal is not None and i < plan.drafted:
        s.metrics.drafted += min(int(plan.proposal.counts[i]), s.draft_limit)
    length = plan.lengths[i] if first >= 0 else 0
    if first >= 0:
        commits.append(Commit(s, s.computed, slice(first, first + accepted + 1), length, accepted))
        s.computed += accepted + 1
    try:
        new, reason = _take(s, [*draft, following])
        said = step.logprobs(i, new)
    except Exception as e:  # one request's text must not end the others'
        log.exception("Request %s failed", s.request.id)
        s.failure = f"{type(e).__name__} after {len(s.output)} tokens: {e}"
        return Emission(s, reason="error")
    if s.logprobs is not None and said is not None:
        s.logprobs += said
    if first >= 0:
        s.metrics.target_steps += 1
        s.metrics.decoded += len(new)
        s.metrics.record_round(length, accepted, len(new))
        plan.outcome.append((s.request.id, length, accepted, len(new)))
    else:
        s.metrics.ttft = time.perf_counter() - s.admitted
    return Emission(s, new, reason, said)


def _take(s: Sequence, new: list[int]) -> tuple[list[int], str | None]:
    """Appends tokens up to the first stop; returns those taken and why the request ends, if it does."""
    taken: list[int] = []
    for token in new:
        taken.append(token)
        s.tokens.append(token)
        ended = token in s.stop_ids
        full = len(s.tokens) - s.prompt_length >= s.request.max_new_tokens
        if s.text is not None:
            s.text.push([token])
            if ended or full:
                s.text.finish()
            if s.text.stopped:
                return taken, "stop"
        if ended or full:
            return taken, "stop" if ended else "length"
    return taken, None


def _completion(s: Sequence, reason: str) -> Completion:
    s.metrics.seconds = time.perf_counter() - (s.admitted or s.submitted)
    error = s.failure if reason == "error" else None
    matched: str | int | None = None if s.text is None else s.text.matched
    if matched is None and reason == "stop" and s.tokens[-1] in s.request.stop_ids:
        matched = s.tokens[-1]
    return Completion(s.request.id, s.output, reason, s.metrics, error, s.logprobs, matched)
