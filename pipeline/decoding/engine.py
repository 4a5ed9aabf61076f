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
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch

from pipeline.config import EngineConfig
from pipeline.decoding.held import HeldCommits
from pipeline.decoding.plan import StepPlan, plan_step
from pipeline.decoding.proposers import NoneProposer
from pipeline.decoding.proposers.base import Commit, Proposal, Proposer
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.decoding.request import Completion, Request, Sequence, StepEvent, TokenLogprob
from pipeline.decoding.runner import TargetRunner
from pipeline.decoding.scheduler import PrefixScheduler, make_scheduler
from pipeline.decoding.step_cost import StepCost
from pipeline.decoding.tables import PageTables
from pipeline.decoding.text import TextStream
from pipeline.decoding.trace import StepRecord, StepTrace
from pipeline.decoding.verification import Verification
from pipeline.decoding.worth import DraftWorth
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target

log = logging.getLogger(__name__)


class QueueFull(DraftlineError):
    """The engine's queue is at its bound; the client should retry later (HTTP 429)."""


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
        self.target = target
        self.config = config
        self.proposer: Proposer = proposer or NoneProposer()
        self.step_cost = step_cost
        self.on_round: Callable[[RoundTrace], None] | None = None
        self.trace = StepTrace(config.trace) if config.trace else None
        if self.trace is not None:
            atexit.register(self.trace.write)
        draft_bytes = self.proposer.page_bytes(config.page_size)
        self.runner = TargetRunner(target, config, self.proposer.layer_ids, draft_bytes)
        self.proposer.attach(self.runner.pool)
        self._tables = PageTables(self.runner.pool, keep=config.prefix_cache)
        # Kept by draft: arms of a comparison that take turns stay in what they learned, as they would when served.
        self._worths: weakref.WeakKeyDictionary[Proposer, DraftWorth] = weakref.WeakKeyDictionary()
        self._worth = self._worths.setdefault(self.proposer, DraftWorth())
        self._held = HeldCommits()
        self._queue: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []
        self._eos = frozenset(target.eos_ids)
        self.set_schedule(config.scheduler, rule=config.rule)

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
        proposer.attach(self.runner.pool)
        if proposer is not self.proposer:
            self.proposer.detach(self.runner.pool)
        self.runner.layer_ids = list(proposer.layer_ids)
        self.proposer = proposer
        self._worth = self._worths.setdefault(proposer, DraftWorth())

    def change_drafts(
        self, add: Mapping[str, Proposer] | None = None, *, default: str, remove: Iterable[str] = ()
    ) -> None:
        """Takes drafts in and out between two steps, while requests run, of an engine made with `SeveralDrafts`.

        Requests that run keep their draft to their end; those that come take `default` or the one they name.

        Raises:
            DraftlineError: an engine with one draft, waiting requests that name one to be removed, or a scheduler that
                weighs step costs in an engine that has not measured any and has requests.
            ConfigError: see `SeveralDrafts.change`.
        """
        drafts = self.proposer
        if not isinstance(drafts, SeveralDrafts):
            raise DraftlineError(
                "This engine has one draft; make it with SeveralDrafts to change drafts while it runs."
            )
        gone = set(remove)
        if waiting := [s.request.id for s in self._queue if s.request.draft in gone]:
            raise DraftlineError(f"Requests that wait name a draft to be removed: {', '.join(waiting[:5])}.")
        weighs = self.step_cost is None and self.scheduler.weighs_cost
        if weighs and self._running and any(p.block_size for p in (add or {}).values()):
            raise DraftlineError("Step costs are not known yet and requests run: call engine.profile() before they do.")
        self._held.hand_over(drafts)  # their taps are of the layers up to now
        drafts.change(add or {}, default, gone)
        self.runner.layer_ids = drafts.layer_ids

    def profile(self) -> StepCost:
        """The step cost table of the file `config.step_cost` where it fits; else it is measured and kept there.

        Raises DraftlineError while requests run.
        """
        if self._running:
            raise DraftlineError("The step cost is measured while no request runs.")
        self.step_cost = self.runner.step_cost(max(self.proposer.block_size, 7) + 1, self.config)
        return self.step_cost

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._running)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            DraftlineError: an invalid field, more tokens than all pages hold, or sampling under a rule and scheduler
                that are not exact together or with a draft made for the other rule.
            QueueFull: `config.max_queue` requests are waiting.
        """
        request.check(self.target.vocab_size, self.config.max_context)
        if request.temperature > 0 and self.rule == "ratio" and not self.scheduler.causal:
            raise DraftlineError(
                f"Request {request.id}: temperature {request.temperature} with engine.rule=ratio and "
                f"engine.scheduler={self.scheduler.name} would not follow the target's distribution (the schedule sees "
                "the tokens it decides on). Use engine.scheduler=asynchronous or early_stop, or engine.rule=coupled."
            )
        drawn = getattr(self.proposer, "rule", None) or self.rule
        if request.temperature > 0 and drawn != self.rule:
            raise DraftlineError(
                f"Request {request.id}: temperature {request.temperature}, but the draft draws its tokens for the "
                f"{drawn} rule and the engine verifies by the {self.rule} rule. Make the proposer with "
                f"rule={self.rule!r}."
            )
        if isinstance(self.proposer, SeveralDrafts):
            self.proposer.check(request.draft)
        elif request.draft is not None:
            raise DraftlineError(f"Request {request.id}: draft is {request.draft!r}, but this engine has one, unnamed.")
        if any(s.request.id == request.id for s in (*self._queue, *self._running)):
            raise DraftlineError(f"Request {request.id}: another request with this id is not finished.")
        self._tables.check(request, self.proposer.block_size)
        if len(self._queue) >= self.config.max_queue:
            raise QueueFull(
                f"Request {request.id}: {len(self._queue)} requests are waiting, the most allowed "
                f"(engine.max_queue={self.config.max_queue}). Try again later."
            )
        stop = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self._eos)
        text = TextStream(self.target.text, request.stop) if request.stop else None
        sequence = Sequence(request, stop, list(request.prompt_ids), text=text)
        sequence.metrics.prompt_tokens = len(request.prompt_ids)
        self._queue.append(sequence)

    def cancel(self, request_id: str, failure: str = "") -> bool:
        """Ends a request at the next step, as cancelled, or with the error `failure`; returns whether it was known."""
        for sequence in [*self._queue, *self._running]:
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
                while waiting and len(self._queue) < self.config.max_queue:
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
        events = self._reap()
        if self._queue and not self._running and self._cost_is_missing:
            self.profile()
        self._admit()
        events += self._reserve()
        if not self._running:
            return events
        drafting, plain = self._whom_to_draft_for([s for s in self._running if s.prefilled])
        decoding = drafting + plain
        if drafting:
            self._held.hand_over(self.proposer)
        began = time.perf_counter()
        proposal = self.proposer.propose(drafting) if drafting else None
        proposed = time.perf_counter()
        lengths = self._schedule(decoding, proposal)
        # Choosing lengths reads the confidences, so that on a GPU the draft has finished here.
        drafted = time.perf_counter()
        plan = plan_step(decoding, self._running, proposal, lengths, self.config.prefill_chunk)
        taps, logits = self.runner.step(plan.segments, plan.tokens, plan.logit_rows)
        self.runner.wait()
        ended = time.perf_counter()
        if decoding and self.proposer.block_size and self.step_cost is not None:
            if proposal is not None:
                self.step_cost.observe_draft(len(drafting), drafted - began)
            if not plan.chunks:  # reading prompts costs otherwise
                self.step_cost.observe(len(plan.tokens), self._mean_context(decoding), ended - drafted)
        for s in plain:
            s.metrics.skipped += self.proposer.block_size > 0 and s.draft_limit > 0
        for s in decoding:
            s.metrics.draft_seconds += drafted - began
            s.metrics.target_seconds += ended - drafted
        events += self._postprocess(plan, taps, logits)
        if self.trace is not None:
            times = (began, proposed, drafted, ended, time.perf_counter())
            prefill = sum(c.rows.stop - c.rows.start for c in plan.chunks)
            self.trace.add(StepRecord(times, len(plan.tokens), prefill, plan.outcome))
        return events

    def _reap(self) -> list[StepEvent]:
        events = []
        for sequence in [*self._queue, *self._running]:
            if sequence.cancelled:
                if sequence in self._queue:
                    self._queue.remove(sequence)
                events.append(self._finish(sequence, [], "error" if sequence.failure else "cancelled"))
        return events

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.config.max_requests:
            sequence = self._queue[0]
            if not self._tables.admit(sequence, self.proposer.tag, spare=len(self._running)):
                return
            self._queue.popleft()
            if not sequence.admitted:
                sequence.admitted = time.perf_counter()
                sequence.metrics.queue_seconds = sequence.admitted - sequence.submitted
            self.proposer.admit(sequence)
            self._running.append(sequence)
            # One that comes back goes before those that came after it.
            self._running.sort(key=lambda s: s.submitted)

    def _reserve(self) -> list[StepEvent]:
        """Pages for the next step's blocks, the oldest request first; the youngest give theirs up where they lack."""
        for s in list(self._running):
            # Where it may be drafted for, the block's slots lie behind the anchor.
            wanted = s.computed + 1 + (self.proposer.block_size if s.draft_limit > 0 else 0)
            while s in self._running and s.prefilled and not self._tables.reserve(s, wanted):
                youngest = self._running[-1]
                if youngest is self._running[0]:  # a draft came whose blocks are longer than when it was submitted
                    s.failure = f"its {len(s.tokens)} tokens and a block behind them no longer fit the KV pages."
                    return [self._finish(s, [], "error")]
                self._preempt(youngest)
        return []

    def _preempt(self, s: Sequence) -> None:
        """Puts a running request back, to be computed again from its tokens; what it emitted stays."""
        log.info("Request %s gives its pages up after %d tokens", s.request.id, len(s.output))
        self._let_go(s, sound=False)
        s.metrics.preempted += 1
        self._queue.appendleft(s)

    def _let_go(self, s: Sequence, *, sound: bool) -> None:
        """Takes a request out of its pages. sound: the logits of all that it computed were finite."""
        if not sound:
            pages = s.pages[s.listed :]
            self.runner.cache.wipe(pages)
            self.proposer.wipe(pages)
        self._held.drop(s)
        self.proposer.release(s)
        self._tables.release(s)
        self._running.remove(s)

    @property
    def _skips_drafts(self) -> bool:
        return self.config.skip_drafts and self.scheduler.weighs_cost and self.proposer.block_size > 0

    def _whom_to_draft_for(self, decoding: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        if self._skips_drafts and decoding and self.step_cost is not None:
            return self._worth.choose(decoding, self.step_cost, self._mean_context(decoding))
        drafted = [s for s in decoding if self.proposer.block_size and s.draft_limit > 0]
        return drafted, [s for s in decoding if not self.proposer.block_size or s.draft_limit <= 0]

    def _schedule(self, decoding: list[Sequence], proposal: Proposal | None) -> list[int]:
        """Lengths of all that decode; of those without a proposal, which come last, 0."""
        if proposal is None:
            return [0] * len(decoding)
        drafted, block = proposal.tokens.shape
        confidence, limits = torch.zeros(len(decoding), block), torch.zeros(len(decoding), dtype=torch.int64)
        confidence[:drafted] = proposal.confidence
        limits[:drafted] = torch.minimum(proposal.counts, torch.tensor([s.draft_limit for s in decoding[:drafted]]))
        cost = None
        if self.step_cost is not None and self.scheduler.weighs_cost:
            cost = self.step_cost.drafting_for(0 if self._worth.trying else drafted)
        # A step that reads prompts too is of any size and no graph's.
        buckets = self.runner.buckets if len(decoding) == len(self._running) else ()
        return self.scheduler.lengths(confidence, cost, self._mean_context(decoding), limits, buckets).tolist()  # type: ignore[arg-type]

    @property
    def _cost_is_missing(self) -> bool:
        return self.step_cost is None and self.scheduler.weighs_cost and self.proposer.block_size > 0

    @staticmethod
    def _mean_context(decoding: list[Sequence]) -> int:
        return sum(len(s.tokens) for s in decoding) // len(decoding)

    def _postprocess(self, plan: StepPlan, taps: torch.Tensor | None, logits: torch.Tensor) -> list[StepEvent]:
        for c in plan.chunks:
            c.sequence.computed += c.rows.stop - c.rows.start
        commits, proposal, drafted = list(plan.chunks), plan.proposal, plan.drafted
        events: list[StepEvent] = []
        if plan.verifying:
            step = Verification([s for s, _ in plan.verifying], proposal, plan.lengths, logits, self.rule)
            accepted, following, finite = (
                t.tolist() for t in (step.result.accepted, step.result.next_token, step.result.finite)
            )
            emitted = [
                self._emit(plan, step, i, accepted[i], following[i] if finite[i] else None, commits)
                for i in range(len(plan.verifying))
            ]
            self._commit(commits, taps, hold=proposal is None)
            if proposal is not None and self._skips_drafts:
                self._worth.observe(plan.decoding[:drafted], proposal, plan.lengths, accepted)
            if self.on_round is not None and proposal is not None:
                self.on_round(
                    RoundTrace(
                        [s.request.id for s in plan.decoding[:drafted]],
                        None if proposal.raw_confidence is None else proposal.raw_confidence.cpu(),
                        torch.tensor(plan.lengths[:drafted]),
                        step.result.accepted[:drafted].cpu(),
                        torch.tensor([len(new) for _, new, _, _ in emitted[:drafted]]),
                    )
                )
            for s, new, reason, said in emitted:
                if reason != "error":
                    self._tables.settle(s)
                if reason is not None:
                    events.append(self._finish(s, new, reason, said))
                else:
                    events.append(StepEvent(s.request.id, new, logprobs=said))
        else:
            self._commit(commits, taps, hold=proposal is None)
        return events

    def _emit(
        self, plan: StepPlan, step: Verification, i: int, accepted: int, following: int | None, commits: list[Commit]
    ) -> tuple[Sequence, list[int], str | None, list[TokenLogprob] | None]:
        """What request `i` of those verified emits, why it ends if it does, and log-probabilities if it asked; its
        accepted positions are added to `commits`. following: the token after them; None: logits that are not finite."""
        s, first = plan.verifying[i]
        if following is None:
            s.failure = (
                f"the target's logits at position {len(s.tokens)} are not finite (after {len(s.output)} tokens, step "
                f"{s.metrics.target_steps}). Check the target's weights and dtype."
            )
            return s, [], "error", None
        draft: list[int] = []
        if plan.proposal is not None and i < plan.drafted:
            draft = plan.proposal.tokens[i, :accepted].tolist()
            s.metrics.drafted += min(int(plan.proposal.counts[i]), s.draft_limit)
        length = plan.lengths[i] if first >= 0 else 0
        if first >= 0:
            commits.append(Commit(s, s.computed, slice(first, first + accepted + 1), length, accepted))
            s.computed += accepted + 1
        try:
            new, reason = self._take(s, [*draft, following])
            said = step.logprobs(i, new)
        except Exception as e:  # one request's text must not end the others'
            log.exception("Request %s failed", s.request.id)
            s.failure = f"{type(e).__name__} after {len(s.output)} tokens: {e}"
            return s, [], "error", None
        if s.logprobs is not None and said is not None:
            s.logprobs += said
        if first >= 0:
            s.metrics.target_steps += 1
            s.metrics.decoded += len(new)
            s.metrics.record_round(length, accepted, len(new))
            plan.outcome.append((s.request.id, length, accepted, len(new)))
        else:
            s.metrics.ttft = time.perf_counter() - s.admitted
        return s, new, reason, said

    def _commit(self, commits: list[Commit], taps: torch.Tensor | None, *, hold: bool) -> None:
        if hold and self._skips_drafts:
            self._held.add(commits, taps, self.proposer)
        else:
            self.proposer.commit(commits, taps)

    def _take(self, s: Sequence, new: list[int]) -> tuple[list[int], str | None]:
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

    def _finish(
        self, s: Sequence, new: list[int], reason: str, logprobs: list[TokenLogprob] | None = None
    ) -> StepEvent:
        if s in self._running:
            self._let_go(s, sound=reason not in ("error", "cancelled"))
        s.metrics.seconds = time.perf_counter() - (s.admitted or s.submitted)
        error = f"Request {s.request.id}: {s.failure}" if reason == "error" else None
        matched: str | int | None = None if s.text is None else s.text.matched
        if matched is None and reason == "stop" and s.tokens[-1] in s.request.stop_ids:
            matched = s.tokens[-1]
        done = Completion(s.request.id, s.output, reason, s.metrics, error, s.logprobs, matched)
        return StepEvent(s.request.id, new, done, logprobs)
