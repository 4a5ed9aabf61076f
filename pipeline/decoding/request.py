"""What goes into the engine and what comes out: requests, completions, events, and their measurements."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping

from draftline_kernels import COLDEST, Adjustment, Said
from pipeline.decoding.text import TextStream
from pipeline.errors import DraftlineError

MOST_LOGPROBS = 20
MOST_TOP_K = 2**31 - 1
"""Beyond any vocabulary; the sampler keeps it in 64 bits, and what doesn't fit would fail the step of all requests."""
LEAST_REPETITION = 0.01
"""A logit is divided by the repetition penalty, and by less than this it would leave what can be told apart."""
_ids = itertools.count()


class RequestRefused(DraftlineError):
    """A request that can't be served.

    Attributes:
        what: is wrong, in words that follow the field's name if there is one.
        request_id: of the request. field: of Request, "" where it is not about one.
    """

    def __init__(self, what: str, request_id: str = "", field: str = "") -> None:
        super().__init__(what)
        self.what, self.request_id, self.field = what, request_id, field

    def __str__(self) -> str:
        whose = f"Request {self.request_id}: " if self.request_id else ""
        return whose + " ".join(filter(None, (self.field, self.what)))


@dataclasses.dataclass
class Request:
    """One text to continue.

    Attributes:
        prompt_ids: tokens of the prompt, at least one.
        max_new_tokens: most tokens to emit, a stop token included.
        temperature: 0 decodes greedily (ties: lowest token id); so does what is below COLDEST, which may not go with
            top_k, top_p or min_p.
        top_k: keep the k most likely tokens (0: all). top_p: keep the nucleus of this mass (1: all). min_p: keep what
            has this share of the likeliest token's probability (0: all); it comes first, then top_k, then top_p (in
            transformers' generate it is last).
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias: see `draftline_kernels.Adjustment`.
        logprobs: with every token its log-probability under the target (temperature 1, nothing adjusted or left out)
            and the most likely so many beside it; None: no log-probabilities.
        seed: with it, a request gives the same text whatever it is batched with.
        stop_ids: tokens that end the text (emitted as its last token); the target's eos tokens are added
            unless `ignore_eos`, which may not go with one of them here.
        stop: strings that end the text: it ends with the token that completes one of them, wherever in a block that is
            (the string itself is among its tokens; TextStream cuts it off what is shown).
        draft: name of the draft, where an engine has several (None: its default).
        max_draft: most draft tokens verified per round for this request (None: the draft's block size; 0: none, plain
            decoding, which may not go with a draft's name).
    """

    prompt_ids: list[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_draft: int | None = None
    draft: str | None = None
    id: str = dataclasses.field(default_factory=lambda: f"request-{next(_ids)}")

    def check(self, vocab_size: int, max_context: int) -> None:
        """Raises RequestRefused naming the first field whose value can't be served."""

        def refuse(field: str, value: object, rule: str) -> None:
            raise RequestRefused(f"is {value!r}; it must be {rule}.", self.id, field)

        if not self.prompt_ids:
            refuse("prompt_ids", self.prompt_ids, "at least one token")
        # Plain integers, here and below: others are cut, overflow or index nothing, in a step that others share.
        for name in ("prompt_ids", "stop_ids"):
            bad = [t for t in getattr(self, name) if type(t) is not int or not 0 <= t < vocab_size]
            if bad:
                refuse(name, bad[0], f"a token id of the target, an integer from 0 to {vocab_size - 1}")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            refuse("max_new_tokens", self.max_new_tokens, "an integer, 1 or more")
        if len(self.prompt_ids) + self.max_new_tokens > max_context:
            refuse(
                "prompt_ids + max_new_tokens",
                f"{len(self.prompt_ids)} + {self.max_new_tokens}",
                f"at most the engine's context of {max_context} tokens (engine.max_context)",
            )
        if not 0.0 <= self.temperature < 100.0:
            refuse("temperature", self.temperature, "from 0 to 100")
        if type(self.top_k) is not int or not 0 <= self.top_k <= MOST_TOP_K:
            refuse("top_k", self.top_k, f"an integer from 0 (off) to {MOST_TOP_K}")
        if type(self.seed) is not int:
            refuse("seed", self.seed, "an integer")
        if not 0.0 < self.top_p <= 1.0:
            refuse("top_p", self.top_p, "above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            refuse("min_p", self.min_p, "from 0 (off) to 1")
        if self.temperature > 0 and self.greedy and (self.top_k or self.top_p < 1 or self.min_p):
            rule = (
                f"0 (greedy) or at least {COLDEST} where top_k, top_p or min_p is asked for, which has no effect below"
            )
            refuse("temperature", self.temperature, rule)
        if not LEAST_REPETITION <= self.repetition_penalty <= 10.0:
            refuse("repetition_penalty", self.repetition_penalty, f"from {LEAST_REPETITION} to 10 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                refuse(name, getattr(self, name), "from -2 to 2")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or not 0 <= token < vocab_size:
                refuse("logit_bias", token, f"of token ids of the target, integers from 0 to {vocab_size - 1}")
            if not -100.0 <= bias <= 100.0:
                refuse(f"logit_bias[{token}]", bias, "from -100 to 100")
        if self.logprobs is not None and (type(self.logprobs) is not int or not 0 <= self.logprobs <= MOST_LOGPROBS):
            refuse("logprobs", self.logprobs, f"an integer from 0 to {MOST_LOGPROBS}, or None")
        if "" in self.stop:
            refuse("stop", self.stop, "of strings that are not empty")
        if self.max_draft is not None and (type(self.max_draft) is not int or self.max_draft < 0):
            refuse("max_draft", self.max_draft, "an integer, 0 or more, or None")
        if self.max_draft == 0 and self.draft is not None:
            refuse("max_draft", 0, f"1 or more, or None, where draft={self.draft!r} is asked for; or leave draft out")

    @property
    def greedy(self) -> bool:
        """It takes the likeliest token each time: neither noise nor what only narrows the choice changes its text."""
        return self.temperature < COLDEST

    @property
    def adjustment(self) -> Adjustment:
        """What the request does to the target's logits before temperature."""
        return Adjustment(self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.logit_bias)

    def samples(self, count: int) -> list[Request]:
        """`count` requests for as many answers: the seeds count up from this one's, ids get a number.

        Raises RequestRefused where they would all be one greedy text.
        """
        if count > 1 and self.greedy:
            raise RequestRefused(
                f"is {self.temperature}, which gives {count} times the same text. Ask for one sample, or raise it.",
                self.id,
                "temperature",
            )
        seeds = [(self.seed + i) & (2**63 - 1) for i in range(count)]
        return [dataclasses.replace(self, seed=seed, id=f"{self.id}/{i}") for i, seed in enumerate(seeds)]


@dataclasses.dataclass
class RequestMetrics:
    """What decoding one request cost and what its draft was worth.

    `target_steps` counts decoding steps of the target (prefill excluded) and `decoded` the tokens they emitted,
    so `tau` is the acceptance length with the bonus token. `drafted` counts proposed tokens, `verified` those the
    scheduler sent to the target, `accepted` those that the target confirmed. Position 0 of the lists is the token
    right after the anchor; `offered[k]` counts rounds in which position k was verified after all before it were
    accepted, so `accepted_at[k] / offered[k]` is the conditional acceptance. Times are wall seconds; in a batch,
    `draft_seconds` and `target_seconds` are those of the shared steps. `skipped` counts decoding steps that
    had room for a draft and none was made, `cached` positions found in pages of earlier texts (`cached_prompt`: when it
    began), `preempted` how often it gave its pages up and was computed again.
    """

    draft: str = ""
    prompt_tokens: int = 0
    target_steps: int = 0
    decoded: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    skipped: int = 0
    cached: int = 0
    cached_prompt: int = 0
    preempted: int = 0
    offered: list[int] = dataclasses.field(default_factory=list)
    accepted_at: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    queue_seconds: float = 0.0
    ttft: float = 0.0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: tokens emitted per decoding step of the target (1.0 for plain decoding)."""
        return self.decoded / self.target_steps if self.target_steps else 1.0

    @property
    def decode_seconds(self) -> float:
        """Seconds from the first token to the last."""
        return self.seconds - self.ttft

    def record_round(self, length: int, accepted: int, emitted: int) -> None:
        """Adds a round that verified `length` draft tokens, kept the first `accepted` and emitted `emitted`.

        Fewer than accepted + 1 are emitted when the text ended inside the block: what lies behind its end neither
        counts as accepted nor as offered.
        """
        kept = min(accepted, emitted)
        self.lengths.append(length)
        self.verified += length
        self.accepted += kept
        while len(self.offered) < length:
            self.offered.append(0)
            self.accepted_at.append(0)
        for k in range(min(length, emitted)):
            self.offered[k] += 1
            self.accepted_at[k] += k < kept


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of an emitted token under the target, and (token id, log-probability) of the most likely ones."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request. `finish_reason`: stop, length, cancelled or error (then `error` says why).

    stop_reason: which of the request's stop strings or stop_ids ended it; None where an eos token did.
    logprobs: one entry per token, where the request asked for them.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """Tokens that one step emitted for one request (with their log-probabilities, where it asked for them), and its
    completion if the step finished it."""

    request_id: str
    token_ids: list[int]
    finished: Completion | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclasses.dataclass(eq=False)
class Sequence:
    """The engine's own state of a request: its tokens, the pages it holds and how much of it is computed.

    Invariant while decoding: `computed == len(tokens) - 1`: the last token is the anchor, whose KV is not cached.
    pages: its table, of the target's keys and the draft's. keys: of its whole pages (see pages.py). listed: how many of
    them others may find (see tables.py).
    text: watches for stop strings, where the request has some. failure: why it can't go on, if it can't.
    said: its tokens listed for bias and penalties, from the first step that asks; it grows with `tokens`.
    """

    request: Request
    stop_ids: frozenset[int]
    tokens: list[int]
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    listed: int = 0
    computed: int = 0
    metrics: RequestMetrics = dataclasses.field(default_factory=RequestMetrics)
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    admitted: float = 0.0
    cancelled: bool = False
    logprobs: list[TokenLogprob] | None = None
    text: TextStream | None = None
    failure: str = ""
    said: Said | None = None

    def __post_init__(self) -> None:
        self.adjustment = None if self.request.adjustment.neutral else self.request.adjustment
        self.logprobs = None if self.request.logprobs is None else []

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def prefill_end(self) -> int:
        """Positions to compute before it decodes: its prompt's, or all before the anchor where it was preempted."""
        return len(self.tokens) - (len(self.tokens) > self.prompt_length)

    @property
    def prefilled(self) -> bool:
        return self.computed >= self.prefill_end

    @property
    def draft_limit(self) -> int:
        """Most draft tokens worth verifying: one emitted token is always the target's own."""
        left = self.request.max_new_tokens - (len(self.tokens) - self.prompt_length) - 1
        return left if self.request.max_draft is None else min(left, self.request.max_draft)
