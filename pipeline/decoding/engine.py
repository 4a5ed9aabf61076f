"""The speculative decoding engine: many requests, one ragged target step, exactly the target's distribution.

    engine = Engine(load_target(...), EngineConfig(...), make_proposer("dspark", draft, ...))
    for done in engine.generate([Request(prompt_ids, max_new_tokens=128)]):
        ...

A step schedules (prompt chunks and blocks to verify), runs the target once, and postprocesses (verify, commit,
stop). Plain decoding is the same engine with the `none` proposer, so a baseline is never another program.
"""

from __future__ import annotations

import atexit
import collections
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pipeline.config import EngineConfig
from pipeline.decoding.batch import Batch
from pipeline.decoding.emission import Emission, RoundTrace, emissions, unsound_prompts
from pipeline.decoding.held import HeldCommits
from pipeline.decoding.plan import StepPlan, confidences, foresee, limits_of, mean_context, plan_ahead, plan_step
from pipeline.decoding.proposers import NoneProposer
from pipeline.decoding.proposers.base import Commit, Proposal, Proposer
from pipeline.decoding.proposers.several import SeveralDrafts, blocks_on_device
from pipeline.decoding.request import Completion, Request, RequestRefused, Sequence, StepEvent
from pipeline.decoding.runner import TargetRunner
from pipeline.decoding.scheduler import PrefixScheduler, make_scheduler
from pipeline.decoding.step_cost import StepCost, StepTimer, padded
from pipeline.decoding.text import TextStream
from pipeline.decoding.trace import StepRecord, StepTrace
from pipeline.decoding.verification import Verification
from pipeline.decoding.worth import DraftWorth
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target

log = logging.getLogger(__name__)


class Engine:
    """Decodes requests with speculative verification.

    Args:
        target: taken over by the engine (see TargetRunner).
        config: sizes, scheduler, verification rule, threads.
        proposer: the draft; None decodes plainly.
        step_cost: a table measured earlier; the engine refines it as it decodes. Without one the first step that drafts
            takes it from `profile()`, where the scheduler needs it.
    Raises:
        ConfigError: a rule and scheduler that are not exact together, unknown names.
    """

    def __init__(
        self,
        target: Target,
        config: EngineConfig,
        proposer: Proposer | None = None,
        step_cost: StepCost | None = None,
    ) -> None:
        if config.threads > 0 and target.device.type == "cpu":
            torch.set_num_threads(config.threads)
        self.target, self.config, self.step_cost = target, config, step_cost
        proposer = proposer or NoneProposer()
        self.on_round: Callable[[RoundTrace], None] | None = None
        self.trace = StepTrace(config.trace) if config.trace else None
        if self.trace is not None:
            atexit.register(self.trace.write)
        draft_bytes = proposer.page_bytes(config.page_size)
        self.runner = TargetRunner(target, config, proposer.layer_ids, draft_bytes, proposer.block_size)
        proposer.attach(self.runner.pool, self.runner.terms)
        self._draft_timer, self._commit_timer = StepTimer([target.device]), StepTimer([target.device])
        self._held = HeldCommits()
        self.batch = Batch(self.runner.pool, self.runner.cache, config, proposer, self._held)
        if self.most_tokens < config.max_context:
            log.warning(
                "A prompt and its answer may have %d tokens, not the %d of engine.max_context: the KV pool's %d pages "
                "of %d tokens hold no more. Raise engine.kv_gib, or free memory where it is 0.",
                self.most_tokens,
                config.max_context,
                self.runner.pool.pages,
                config.page_size,
            )
        # Kept by draft: arms of a comparison that take turns stay in what they learned, as they would when served.
        self._worths: weakref.WeakKeyDictionary[Proposer, DraftWorth] = weakref.WeakKeyDictionary()
        self._worth = self._worths.setdefault(proposer, DraftWorth())
        self._eos = frozenset(target.eos_ids)
        self.set_schedule(config.scheduler, rule=config.rule)

    @property
    def proposer(self) -> Proposer:
        return self.batch.proposer

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer: engine.max_context, or less where all pages hold less."""
        return min(self.config.max_context, self.batch.most_tokens)

    # -- configuration between requests ---------------------------------------------------------------------------

    def set_schedule(self, scheduler: str, length: int | None = None, rule: str | None = None) -> None:
        """Chooses the prefix scheduler (and verification rule) for the steps to come.

        Raises ConfigError for unknown names, DraftlineError while requests run. A non-causal scheduler with the ratio
        rule is refused per request, when one that samples is submitted: greedy decoding is exact under any schedule.
        """
        made = make_scheduler(scheduler, length, self.config.threshold)
        rule = rule or self.config.rule
        if rule not in ("coupled", "ratio"):
            raise ConfigError(f"engine.rule={rule!r} is not one of coupled, ratio.")
        if self.has_work:
            raise DraftlineError("The schedule can't be changed while requests run; finish or cancel them first.")
        self.scheduler: PrefixScheduler = made
        self.rule = rule

    def set_proposer(self, proposer: Proposer) -> None:
        """Changes the draft, and with it the layers tapped, while no request runs.

        The former draft's keys and values are let go; the target's pages stay.

        Raises DraftlineError while requests run, or when there is no memory for the new one's keys and values.
        """
        if self.has_work:
            raise DraftlineError("The draft can't be changed while requests run; finish or cancel them first.")
        proposer.attach(self.runner.pool, self.runner.terms)
        if proposer is not self.proposer:
            self.proposer.detach(self.runner.pool)
        self.runner.layer_ids = list(proposer.layer_ids)
        self.batch.proposer = proposer
        self._worth = self._worths.setdefault(proposer, DraftWorth())

    def change_drafts(
        self, add: Mapping[str, Proposer] | None = None, *, default: str, remove: Iterable[str] = ()
    ) -> None:
        """Takes drafts in and out between two steps, while requests run, of an engine made with `SeveralDrafts`.

        Requests that run keep their draft to their end; those that come take `default` or the one they name.

        Raises:
            DraftlineError: an engine with one draft, waiting requests that name one to be removed, or a scheduler that
                weighs step costs in an engine that has not measured any and has requests.
            ConfigError: a draft made for another rule than the engine verifies by; see also `SeveralDrafts.change`.
        """
        drafts = self.proposer
        if not isinstance(drafts, SeveralDrafts):
            raise DraftlineError(
                "This engine has one draft; make it with SeveralDrafts to change drafts while it runs."
            )
        # Requests that sample may wait already: `submit` looked at the drafts that there were.
        for name, proposer in (add or {}).items():
            if (drawn := self._other_rule(proposer)) is not None:
                raise ConfigError(
                    f"The draft {name!r} draws its tokens for the {drawn} rule and the engine verifies by the "
                    f"{self.rule} rule. Make the proposer with rule={self.rule!r}."
                )
        gone = set(remove)
        if waiting := [s.request.id for s in self.batch.waiting if s.request.draft in gone]:
            raise DraftlineError(f"Requests that wait name a draft to be removed: {', '.join(waiting[:5])}.")
        weighs = self.step_cost is None and self.scheduler.weighs_cost
        if weighs and self.batch.running and any(p.block_size for p in (add or {}).values()):
            raise DraftlineError("Step costs are not known yet and requests run: call engine.profile() before they do.")
        self._held.hand_over(drafts)  # their taps are of the layers up to now
        drafts.change(add or {}, default, gone)
        self.runner.layer_ids = drafts.layer_ids

    def profile(self) -> StepCost:
        """Records steps; returns step costs: those of the file `config.step_cost` where they fit, else measured now.

        Raises DraftlineError while requests run.
        """
        if self.batch.running:
            raise DraftlineError("The step cost is measured while no request runs.")
        self.step_cost = self.runner.step_cost(max(self.proposer.block_size, 7) + 1, self.config)
        if self.scheduler.foresees:
            self.runner.record_ahead(blocks_on_device(self.proposer))
        return self.step_cost

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return not self.batch.empty

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestRefused: an invalid field, fields that contradict each other, more tokens than all pages hold, or
                sampling under a rule and scheduler that are not exact together or with a draft made for the other rule.
            QueueFull: `config.max_queue` requests are waiting.
        """
        request.check(self.target.vocab_size, self.config.max_context)
        if request.temperature > 0 and self.rule == "ratio" and not self.scheduler.causal:
            raise RequestRefused(
                f"{request.temperature} with engine.rule=ratio and engine.scheduler={self.scheduler.name} would not "
                "follow the target's distribution (the schedule sees the tokens it decides on). Use "
                "engine.scheduler=asynchronous or early_stop, or engine.rule=coupled.",
                request.id,
                "temperature",
            )
        if request.temperature > 0 and (drawn := self._other_rule(self.proposer)) is not None:
            raise RequestRefused(
                f"{request.temperature}, but the draft draws its tokens for the {drawn} rule and the engine verifies "
                f"by the {self.rule} rule. Make the proposer with rule={self.rule!r}.",
                request.id,
                "temperature",
            )
        if isinstance(self.proposer, SeveralDrafts):
            self.proposer.check(request)
        elif request.draft is not None:
            raise RequestRefused(f"is {request.draft!r}, but this engine has one, unnamed.", request.id, "draft")
        if request.ignore_eos and (both := self._eos.intersection(request.stop_ids)):
            raise RequestRefused(
                f"holds {min(both)}, an eos token of the target, and ignore_eos is True. Leave one of them out.",
                request.id,
                "stop_ids",
            )
        stop = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self._eos)
        text = TextStream(self.target.text, request.stop) if request.stop else None
        sequence = Sequence(request, stop, list(request.prompt_ids), text=text)
        sequence.metrics.prompt_tokens = len(request.prompt_ids)
        self.batch.enqueue(sequence)

    def _other_rule(self, proposer: Proposer) -> str | None:
        """The rule that a proposer draws for where the engine verifies by another; else None."""
        drawn = getattr(proposer, "rule", None) or self.rule
        return None if drawn == self.rule else drawn

    def cancel(self, request_id: str, failure: str = "") -> bool:
        """Ends a request at the next step, as cancelled, or with the error `failure`; returns whether it was known."""
        for sequence in self.batch:
            if sequence.request.id == request_id:
                sequence.cancelled, sequence.failure = True, sequence.failure or failure
                return True
        return False

    def generate(
        self, requests: Iterable[Request], on_event: Callable[[StepEvent], None] | None = None
    ) -> list[Completion]:
        """Decodes requests to their end, however many; completions come in the order of the requests.

        Whatever is raised (a request that can't be served, an interruption), none of them stays in the engine.
        """
        waiting = collections.deque(requests)
        order = [r.id for r in waiting]
        if len(set(order)) != len(order):
            raise DraftlineError("Two requests have the same id; ids must be unique.")
        done: dict[str, Completion] = {}
        try:
            while waiting or self.has_work:
                while waiting and len(self.batch.waiting) < self.config.max_queue:
                    self.submit(waiting.popleft())
                for event in self.step():
                    if on_event:
                        on_event(event)
                    if event.finished:
                        done[event.request_id] = event.finished
        except BaseException:
            for i in order:
                self.cancel(i)
            self._reap()
            raise
        return [done[i] for i in order]

    # -- a step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepEvent]:
        """Advances every running request by one target step; returns what was emitted."""
        events, batch = self._reap(), self.batch
        weighs = self.scheduler.weighs_cost and self.proposer.block_size > 0
        if batch.waiting and not batch.running and weighs and self.step_cost is None:
            self.profile()
        batch.admit()
        if (overlong := batch.reserve()) is not None:
            events.append(self._end(Emission(overlong, reason="error")))
        if not batch.running:
            return events
        drafting, plain = self._whom_to_draft_for([s for s in batch.running if s.prefilled])
        for s in plain:
            s.metrics.skipped += self.proposer.block_size > 0 and s.draft_limit > 0
        decoding = drafting + plain
        began, recordings = time.perf_counter(), self.runner.recordings
        self._commit_timer.start()
        told = self._held.hand_over(self.proposer, drafting) if drafting else 0
        self._commit_timer.stop()
        self._draft_timer.start()
        proposal = self.proposer.propose(drafting) if drafting else None
        self._draft_timer.stop()
        proposed = drafted = time.perf_counter()
        if (ahead := self._run_ahead(decoding, proposal)) is not None:
            plan, taps, logits = ahead
        else:
            lengths = self._schedule(decoding, proposal)
            # Choosing lengths reads the confidences, so that on a GPU the draft has finished here.
            drafted = time.perf_counter()
            plan = plan_step(decoding, batch.running, proposal, lengths, self.config.prefill_chunk)
            taps, logits = self.runner.step(plan.segments, plan.tokens, plan.logit_rows)
        ended = time.perf_counter()
        events += self._postprocess(plan, taps, logits)
        # What was emitted has been read by now, so that asking for the time makes nobody wait for the device.
        target = self.runner.seconds() if decoding or self.trace is not None else 0.0
        committing = self._commit_timer.seconds() if told else 0.0
        if ahead is not None:
            drafted = max(proposed, began + committing + self._draft_timer.seconds())
        cost = self.step_cost if self.runner.recordings == recordings else None  # recording takes its time
        if decoding and self.proposer.block_size and cost is not None:
            if proposal is not None:
                cost.observe_draft(len(drafting), max(drafted - began - committing, 0.0), told, committing)
            if not plan.chunks:  # reading prompts costs otherwise
                cost.observe(self.runner.run_as(len(plan.tokens)), plan.context, target)
        for s in decoding:
            s.metrics.draft_seconds += drafted - began
            s.metrics.target_seconds += target
        if self.trace is not None:
            times = (began, proposed, drafted, max(ended, drafted + target), time.perf_counter())
            self.trace.add(StepRecord(times, len(plan.tokens), plan.prefill, plan.outcome))
        return events

    def _reap(self) -> list[StepEvent]:
        return [self._end(Emission(s, reason="error" if s.failure else "cancelled")) for s in self.batch if s.cancelled]

    def _end(self, emission: Emission) -> StepEvent:
        """Takes a request that ends out of the batch."""
        self.batch.remove(emission.sequence, sound=emission.reason not in ("error", "cancelled"))
        return emission.event()

    @property
    def _skips_drafts(self) -> bool:
        return self.config.skip_drafts and self.scheduler.weighs_cost and self.proposer.block_size > 0

    def _whom_to_draft_for(self, decoding: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        if self._skips_drafts and decoding and self.step_cost is not None:
            return self._worth.choose(decoding, self.step_cost, mean_context(decoding), self._held.rows)
        drafted = [s for s in decoding if self.proposer.block_size and s.draft_limit > 0]
        return drafted, [s for s in decoding if not self.proposer.block_size or s.draft_limit <= 0]

    def _schedule(self, decoding: list[Sequence], proposal: Proposal | None) -> list[int]:
        """Lengths of all that decode; of those without a proposal, which come last, 0."""
        if proposal is None:
            return [0] * len(decoding)
        # A step that reads prompts too is of no recorded size.
        buckets = self.runner.buckets if len(decoding) == len(self.batch.running) else ()
        limits, known = torch.tensor(limits_of(decoding, proposal)), confidences(decoding, proposal)
        return self.scheduler.lengths(known, self._cost(proposal), mean_context(decoding), limits, buckets).tolist()

    def _cost(self, proposal: Proposal) -> Any:
        """What the scheduler weighs; None where it weighs nothing."""
        if self.step_cost is None or not self.scheduler.weighs_cost:
            return None
        cost = self.step_cost.drafting_for(0 if self._worth.trying else len(proposal.tokens))
        return cost if self.scheduler.stops else padded(cost, self.runner.buckets)

    def _run_ahead(
        self, decoding: list[Sequence], proposal: Proposal | None
    ) -> tuple[StepPlan, torch.Tensor | None, torch.Tensor] | None:
        """Runs the step before the host has seen what was drafted, where its size is foreseen and it is recorded."""
        if proposal is None or len(decoding) < len(self.batch.running):
            return None
        if (ahead := foresee(decoding, proposal, self.scheduler, self.runner)) is None:
            return None
        plan = plan_ahead(decoding, proposal, ahead)
        done = self.runner.step_ahead(plan.segments, plan.tokens, proposal.tokens, ahead)
        return None if done is None else (plan, *done)

    def _postprocess(self, plan: StepPlan, taps: torch.Tensor | None, logits: torch.Tensor) -> list[StepEvent]:
        for c in plan.chunks:
            c.sequence.computed += c.rows.stop - c.rows.start
        proposal = plan.proposal
        if not plan.verifying:
            self._commit(plan.chunks, [], taps)
            return self._end_unsound(plan)
        step = Verification(plan, logits, self.rule)
        emitted, commits, accepted = emissions(plan, step)
        if proposal is not None and plan.ahead is not None:
            heard = confidences(plan.decoding, proposal)
            self.scheduler.learn(heard, self._cost(proposal), plan.context, torch.tensor(plan.ahead.limits))
        self._commit(plan.chunks, commits, taps)
        if proposal is not None:
            if self._skips_drafts:
                self._worth.observe(plan.decoding[: plan.drafted], proposal, plan.lengths, accepted)
            if self.on_round is not None:
                self.on_round(RoundTrace.of(plan, accepted, emitted))
        events = []
        for e in emitted:
            if e.reason != "error":
                self.batch.settle(e.sequence)
            events.append(e.event() if e.reason is None else self._end(e))
        return events + self._end_unsound(plan)

    def _end_unsound(self, plan: StepPlan) -> list[StepEvent]:
        return [self._end(Emission(s, reason="error")) for s in unsound_prompts(plan, self.runner.unsound)]

    def _commit(self, chunks: list[Commit], blocks: list[Commit], taps: torch.Tensor | None) -> None:
        """Tells the draft what became part of texts, or keeps it until it is asked for them again, if ever."""
        self._held.take(chunks, blocks, taps, self.proposer, hold=self._skips_drafts, shown=self.config.prefix_cache)
