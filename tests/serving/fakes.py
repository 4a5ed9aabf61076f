"""An engine that says what it is told to, with a byte-level tokenizer: serving without a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.decoding.batch import QueueFull
from pipeline.decoding.request import Completion, Request, RequestMetrics, RequestRefused, StepEvent, TokenLogprob
from pipeline.serving.http import build
from pipeline.serving.replica import TargetReplica

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (in byte-level BPE's alphabet) and two special ones: characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _text(ids: Sequence[int]) -> str:
    return str(byte_tokenizer().decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _logprob(token: int, most: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [(token, -0.5), (token + 1, -1.5)][:most])


class FakeEngine:
    """Answers every request with `answer`, `per_step` tokens a step, taking `delay` seconds a step.

    `cancelled` lists the ids that were cancelled, `failures` has why, where that was told; `fail` makes the next step
    raise, `refusal` the next submission. `cached` tokens of every prompt were found. `target.eos_ids` end a text, as a
    request's stop_ids do.
    """

    def __init__(self, answer: str = "Hello!", per_step: int = 3, delay: float = 0.0, max_queue: int = 8) -> None:
        self.target = SimpleNamespace(
            tokenizer=byte_tokenizer(),
            identity=SimpleNamespace(id="fake/target"),
            text=_text,
            eos_ids=[byte_tokenizer().eos_token_id],
        )
        self.config = SimpleNamespace(max_context=256, max_requests=4, threads=0)
        self.most_tokens = 256
        self.proposer = SimpleNamespace(block_size=7)
        self.tokens = byte_tokenizer()(answer)["input_ids"]
        self.per_step, self.delay, self.max_queue = per_step, delay, max_queue
        self.running: dict[str, tuple[Request, list[int]]] = {}
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.failures: dict[str, str] = {}
        self.most_at_once = 0
        self.fail: BaseException | None = None
        self.refusal: RequestRefused | None = None
        self.cached = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        if len(self.running) >= self.max_queue:
            raise QueueFull(f"{len(self.running)} requests are waiting.", request.id)
        request.check(300, self.config.max_context)
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.running[request.id] = (request, [])

    def cancel(self, request_id: str, failure: str = "") -> bool:
        if request_id in self.running:
            self.cancelled.append(request_id)
            if failure:
                self.failures[request_id] = failure
        return request_id in self.running

    def step(self) -> list[StepEvent]:
        time.sleep(self.delay)
        if self.fail is not None:
            raise self.fail
        self.most_at_once = max(self.most_at_once, len(self.running))
        events = []
        for name, (request, out) in list(self.running.items()):
            room = request.max_new_tokens - len(out)
            new = [] if name in self.cancelled else self.tokens[len(out) :][: min(self.per_step, room)]
            matched = None
            for n in range(len(new)):
                text = _text(out + new[: n + 1])
                matched = next((s for s in request.stop if s in text), None)
                if matched is None and new[n] in request.stop_ids:
                    matched = new[n]
                if matched is not None or new[n] in self.target.eos_ids:
                    new = new[: n + 1]
                    break
            out += new
            ends = matched is not None or len(out) == len(self.tokens) or out[-1] in self.target.eos_ids
            reason = "stop" if ends else "length" if len(out) == request.max_new_tokens else None
            said = None if request.logprobs is None else [_logprob(t, request.logprobs) for t in new]
            reason = "cancelled" if name in self.cancelled else reason
            done = None
            if reason:
                metrics = RequestMetrics(
                    target_steps=2, decoded=5, drafted=6, verified=4, accepted=3, cached_prompt=self.cached
                )
                done = Completion(name, list(out), reason, metrics, stop_reason=matched)
                del self.running[name]
            events.append(StepEvent(name, new, done, said))
        return events


@dataclasses.dataclass
class Local:
    """A replica in this process as the HTTP surface's backend."""

    replica: TargetReplica

    async def describe(self) -> dict[str, Any]:
        return self.replica.describe()

    async def health(self) -> dict[str, Any]:
        return self.replica.health()

    def generate(self, job: dict[str, Any]) -> Any:
        return self.replica.generate(job)


@contextlib.contextmanager
def serving(engine: Any, **names: Any) -> Iterator[tuple[str, TargetReplica]]:
    """An HTTP server over a replica of this engine; yields its base URL and the replica."""
    replica = TargetReplica(engine, **names)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build(Local(replica)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", replica
        finally:
            server.should_exit = True
            thread.join(10)
            replica.close()


def until(true: Any, seconds: float = 10.0) -> None:
    """Waits for a condition; fails the test when it doesn't come."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, f"not within {seconds} s"
        time.sleep(0.01)
