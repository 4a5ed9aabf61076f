"""What one step of the target runs: the blocks to verify and the next chunks of prompts, flattened."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from pipeline.decoding.cache import on_device
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.scheduler import PrefixScheduler, spread
from pipeline.decoding.table_layout import Segment


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is known of blocks that only the device has.

    Attributes:
        lengths: int64[B] there. tokens: T, those of all blocks with their anchors. limits: most lengths.
    """

    lengths: torch.Tensor
    tokens: int
    limits: list[int]


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
        context: mean tokens of the texts that decode, before the step.
        ahead: of a step that runs before the host knows its blocks; until it does (`known`) segments have no tokens,
            tokens are the anchors alone, and there are no lengths and rows.
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
    ahead: Ahead | None = None
    context: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.context = mean_context(self.decoding)

    @property
    def drafted(self) -> int:
        """How many requests were drafted for."""
        return 0 if self.proposal is None else len(self.proposal.tokens)

    @property
    def prefill(self) -> int:
        """Tokens of prompts."""
        return sum(c.rows.stop - c.rows.start for c in self.chunks)

    def known(self, lengths: list[int]) -> None:
        """Fills in the blocks: the requests' lengths, and what was drafted for them."""
        self.lengths, self.segments, self.tokens = lengths, [], []
        self.logit_rows, self.verifying = [], []
        drafts: list[list[int]] = [] if self.proposal is None else list(self.proposal.on_host[0])
        drafts += [[]] * (len(self.decoding) - len(drafts))
        for s, draft, length in zip(self.decoding, drafts, lengths, strict=True):
            first = len(self.tokens)
            self.segments.append(Segment(s.pages, s.computed, length + 1))
            self.tokens += [s.tokens[-1], *draft[:length]]
            self.logit_rows += range(first, first + length + 1)
            self.verifying.append((s, first))


class Runner(Protocol):
    """As much of the target's as `foresee` asks: the sizes of its recorded steps, and whether one could run ahead."""

    buckets: tuple[int, ...]

    def may_run_ahead(self, tokens: int, drafts: torch.Tensor) -> bool: ...


def foresee(decoding: list[Sequence], proposal: Proposal, scheduler: PrefixScheduler, runner: Runner) -> Ahead | None:
    """What a step over B requests and the blocks of the first ones will be; None where that can't be told yet, or could
    not be run."""
    if not runner.buckets or any(s.adjustment is not None for s in decoding):
        return None  # what penalties count in a block is counted on the host
    limits, device = limits_of(decoding, proposal), proposal.tokens.device
    foreseen = scheduler.foreseen(limits, runner.buckets)
    if foreseen is None:
        return None
    count = foreseen if isinstance(foreseen, int) else sum(foreseen)
    if not runner.may_run_ahead(count + len(limits), proposal.tokens):
        return None
    if not isinstance(foreseen, int):
        return Ahead(on_device(foreseen, device), count + len(limits), limits)
    confidence = torch.nn.functional.pad(proposal.confidence.float(), (0, 0, 0, len(limits) - len(proposal.tokens)))
    return Ahead(spread(confidence, on_device(limits, device), count), count + len(limits), limits)


def plan_ahead(decoding: list[Sequence], proposal: Proposal, ahead: Ahead) -> StepPlan:
    """A step of blocks alone that the host doesn't know yet."""
    plan = StepPlan(decoding, proposal, [], verifying=[(s, -1) for s in decoding], ahead=ahead)
    plan.segments = [Segment(s.pages, s.computed, 0) for s in decoding]
    plan.tokens = [s.tokens[-1] for s in decoding]
    return plan


def mean_context(decoding: list[Sequence]) -> int:
    """Tokens of a text, on average; 0 of none."""
    return sum(len(s.tokens) for s in decoding) // max(len(decoding), 1)


def confidences(decoding: list[Sequence], proposal: Proposal) -> torch.Tensor:
    """float32[B, K] of all; 0 of those without a proposal, which come last."""
    known = proposal.on_host[1]
    if len(known) == len(decoding):
        return known
    return torch.nn.functional.pad(known, (0, 0, 0, len(decoding) - len(known)))


def limits_of(decoding: list[Sequence], proposal: Proposal) -> list[int]:
    """How many draft tokens of each request may be verified; none of those without a proposal, which come last."""
    counts = proposal.counts.tolist()
    limits = [min(n, s.draft_limit) for n, s in zip(counts, decoding, strict=False)]
    return limits + [0] * (len(decoding) - len(limits))


def plan_step(
    decoding: list[Sequence], running: list[Sequence], proposal: Proposal | None, lengths: list[int], prefill: int
) -> StepPlan:
    """Flattens a step.

    Args:
        running: all requests, of which those with unread prompt get chunks, first come first served. prefill: most
            prompt tokens of a step.
    """
    plan = StepPlan(decoding, proposal, [])
    plan.known(lengths)
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
