"""What one step of the target runs: the blocks to verify and the next chunks of prompts, flattened."""

from __future__ import annotations

import dataclasses

from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.table_layout import Segment


@dataclasses.dataclass
class StepPlan:
    """A step's T tokens and whose they are.

    Attributes:
        decoding: requests with a block (or just their anchor) in the step; those drafted for come first.
        proposal: of the first ones of them. lengths: how many of its tokens are verified, per decoding request.
        segments, tokens, logit_rows: see `TargetRunner.step`.
        verifying: requests whose rows decide what they emit: those that decode with the first of their rows, then those
            whose prompt ends in this step with -1.
        chunks: positions of prompts in this step.
        outcome: filled by verification: per decoding request id, verified length, accepted and emitted tokens.
    """

    decoding: list[Sequence]
    proposal: Proposal | None
    lengths: list[int]
    segments: list[Segment] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logit_rows: list[int] = dataclasses.field(default_factory=list)
    verifying: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)
    chunks: list[Commit] = dataclasses.field(default_factory=list)
    outcome: list[tuple[str, int, int, int]] = dataclasses.field(default_factory=list)

    @property
    def drafted(self) -> int:
        """How many requests were drafted for."""
        return 0 if self.proposal is None else len(self.proposal.tokens)


def plan_step(
    decoding: list[Sequence], running: list[Sequence], proposal: Proposal | None, lengths: list[int], prefill: int
) -> StepPlan:
    """Flattens a step.

    Args:
        running: all requests, of which those with unread prompt get chunks, first come first served. prefill: most
            prompt tokens of a step.
    """
    plan = StepPlan(decoding, proposal, lengths)
    drafts: list[list[int]] = [] if proposal is None else list(proposal.on_host[0])
    drafts += [[]] * (len(decoding) - len(drafts))
    for s, draft, length in zip(decoding, drafts, lengths, strict=True):
        first = len(plan.tokens)
        plan.segments.append(Segment(s.pages, s.computed, length + 1))
        plan.tokens += [s.tokens[-1], *draft[:length]]
        plan.logit_rows += range(first, first + length + 1)
        plan.verifying.append((s, first))
    for s in running:
        if s.prefilled or prefill <= 0:
            continue
        count = min(prefill, s.prefill_end - s.computed)
        prefill -= count
        first = len(plan.tokens)
        plan.segments.append(Segment(s.pages, s.computed, count))
        plan.tokens += s.tokens[s.computed : s.computed + count]
        plan.chunks.append(Commit(s, s.computed, slice(first, first + count)))
        # A request that is computed again has emitted its next token already.
        if s.computed + count == s.prefill_end and not s.output:
            plan.logit_rows.append(first + count - 1)
            plan.verifying.append((s, -1))
    return plan
