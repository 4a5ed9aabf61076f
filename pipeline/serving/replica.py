"""The target's side of serving: text in, an engine that many requests share, text out, one item per engine step.

Nothing here knows Ray or HTTP: `app.py` makes it a deployment, and a process of one's own can use it as it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.config import EngineConfig, TargetConfig
from pipeline.corpus.conversations import Message, with_system_prompt
from pipeline.corpus.rows import ChatFormat, TemplateError
from pipeline.decoding.batch import QueueFull
from pipeline.decoding.engine import Engine
from pipeline.decoding.proposers import make_proposer
from pipeline.decoding.request import Completion, Request, RequestRefused, StepEvent, TokenLogprob
from pipeline.decoding.text import TextStream
from pipeline.errors import DraftlineError
from pipeline.serving.engine_loop import EngineLoop
from pipeline.serving.pieces import TokenPieces
from pipeline.serving.protocol import ApiError, unknown_model
from pipeline.target import load_target

log = logging.getLogger(__name__)


def build_engine(
    target: TargetConfig, config: EngineConfig, cache_dir: Path | str, draft_dir: Path | str | None
) -> Engine:
    """Loads a target with its draft (None: plain decoding) and measures the step cost the scheduler needs.

    Raises:
        DraftlineError: a target or draft that is missing, damaged or doesn't fit.
    """
    loaded = load_target(target, Path(cache_dir))
    if draft_dir is None:
        return Engine(loaded, config)
    from pipeline.drafts.checkpoint import load_draft

    draft = load_draft(Path(draft_dir), loaded)
    proposer = make_proposer(
        draft.config.algorithm,
        draft,
        rule=config.rule,
        pack=config.prepack,
    )
    engine = Engine(loaded, config, proposer)
    if engine.scheduler.weighs_cost:
        engine.profile()
    return engine


@dataclasses.dataclass(frozen=True)
class _Choice:
    index: int
    text: TextStream


class TargetReplica:
    """One target with its draft, decoding the requests of all clients together.

    Args:
        engine: owned from now on; stepped by a thread of this object's.
        model_name: the registered model's name, which clients may use beside the target's id.
        draft_version: version of the draft in the registry, told with every answer.
        system_prompt: put before chats that have no system message, as the corpus had it: the draft learned after it.
    """

    def __init__(
        self,
        engine: Any,
        model_name: str | None = None,
        draft_version: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self._tokenizer = engine.target.tokenizer
        self._pieces = TokenPieces(self._tokenizer)
        self._text: Callable[[list[int]], str] = engine.target.text
        self._id: str = engine.target.identity.id
        self._context: int = engine.most_tokens
        self._drafts: bool = engine.proposer.block_size > 0
        self._names = [self._id, *([model_name] if model_name else [])]
        self._draft_version = draft_version
        self._system_prompt = system_prompt
        self._created = int(time.time())
        self._draining = False
        self._chat_stops: tuple[int, ...] = ()
        try:
            self._chat: ChatFormat | None = ChatFormat(self._tokenizer)
            self._no_chat = ""
            self._chat_stops = self._chat.stop_ids(engine.target.eos_ids)
        except TemplateError as e:
            self._chat, self._no_chat = None, str(e)
        # oneDNN asks OpenMP for its threads, whose number is each thread's own: the engine's thread would decode on the
        # one that Ray's OMP_NUM_THREADS leaves it, at a third of the speed, whatever was set where it was built.
        threads = engine.config.threads
        self._loop = EngineLoop(engine, (lambda: torch.set_num_threads(threads)) if threads > 0 else None)

    def describe(self) -> dict[str, Any]:
        """Names that clients may ask for, the first being the target's id, and what serves them."""
        return {
            "names": self._names,
            "created": self._created,
            "max_context": self._context,
            "draft_version": self._draft_version,
        }

    def health(self) -> dict[str, Any]:
        """`status` is ok, draining or dead; `active` counts requests in flight."""
        status = "dead" if not self._loop.alive else "draining" if self._draining else "ok"
        return {"status": status, "active": self._loop.active, "draft_version": self._draft_version}

    def check_health(self) -> None:
        """Ray Serve's probe: raises when the engine's thread died, so that the replica is replaced."""
        if not self._loop.alive:
            raise RuntimeError(f"The engine's thread died: {self._loop.error!r}")

    async def drain(self, timeout: float = 30.0) -> bool:
        """Refuses new requests (503) and waits for those in flight; returns whether all of them ended in time."""
        self._draining = True
        ends = time.monotonic() + timeout
        while self._loop.active and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        return self._loop.active == 0

    def close(self) -> None:
        """Ends the engine's thread; requests in flight fail."""
        self._loop.close()

    async def generate(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answers one request (`Sampled.job` of protocol.py); closing the iterator cancels it.

        Yields:
            `accepted` (model: the target's id, prompt_tokens) once the engine has it, then for each of the job's n
            choices (index) `text` (text, logprobs: of the tokens of that step or None), at most one per engine step,
            and `done` (finish_reason, stop_reason, prompt_tokens, cached_tokens of them, completion_tokens, draftline).
            Or `error` (status, message, param, code), at the start or in place of the first `done`.
        """
        try:
            request = self._request(job)
            samples = request.samples(job["n"])
        except ApiError as e:
            yield e.item()
            return
        except RequestRefused as e:
            yield _refusal(e, job).item()
            return
        here = asyncio.get_running_loop()
        events: asyncio.Queue[StepEvent] = asyncio.Queue()
        choices = {r.id: _Choice(i, TextStream(self._text, r.stop)) for i, r in enumerate(samples)}
        going = set[str]()

        def tell(event: StepEvent) -> None:
            here.call_soon_threadsafe(events.put_nowait, event)

        try:
            try:
                going.update(r.id for r in samples)
                # All at once: one after the other, each would wait for a step of the engine.
                for taken in [self._loop.submit(r, tell) for r in samples]:
                    await asyncio.wrap_future(taken)
            except QueueFull as e:
                yield ApiError(429, _sentence(e.what), code="queue_full").item()
                return
            except RequestRefused as e:
                yield _refusal(e, job).item()
                return
            except RuntimeError as e:
                yield ApiError(503, str(e), code="engine_stopped").item()
                return
            yield {"kind": "accepted", "model": self._id, "prompt_tokens": len(request.prompt_ids)}
            while going:
                event = await events.get()
                choice = choices[event.request_id]
                try:
                    said = self._said(choice, event)
                except Exception as e:  # the text of this answer alone
                    log.exception("The text of request %s failed", event.request_id)
                    cause = f"its text failed: {type(e).__name__}: {e}"
                    going.discard(event.request_id)
                    self._loop.cancel(event.request_id, cause)
                    yield _failure(cause).item()
                    return
                if said is not None:
                    yield said
                if event.finished is not None:
                    going.discard(event.request_id)
                    item = self._done(event.finished, request, choice.index)
                    yield item
                    if item["kind"] == "error":
                        return
        finally:
            for request_id in going:
                self._loop.cancel(request_id)

    def _said(self, choice: _Choice, event: StepEvent) -> dict[str, Any] | None:
        """The `text` item of an event; None where it has nothing to show yet."""
        piece = choice.text.push(event.token_ids)
        if event.finished is not None:
            piece += choice.text.finish()
        logprobs = None if event.logprobs is None else [self._logprob(entry) for entry in event.logprobs]
        return (
            {"kind": "text", "index": choice.index, "text": piece, "logprobs": logprobs} if piece or logprobs else None
        )

    def _request(self, job: dict[str, Any]) -> Request:
        if self._draining:
            raise ApiError(503, "The server is draining and takes no new requests.", code="draining")
        if job["model"] not in self._names:
            raise unknown_model(job["model"], self._names)
        if not self._drafts and job["speculation"] not in (None, "off"):
            raise ApiError(
                400,
                f"speculation is {job['speculation']!r}, but this server has no draft; leave it out, or use 'off'.",
                "speculation",
                "unsupported_value",
            )
        field = "messages" if "messages" in job else "prompt"
        ids = self._chat_ids(job["messages"]) if "messages" in job else self._prompt_ids(job["prompt"])
        room = self._context - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"{field} is {len(ids)} tokens long; with the answer it must fit in {self._context} tokens.",
                field,
                "context_length_exceeded",
            )
        wanted = room if job["max_tokens"] is None else job["max_tokens"]
        if wanted > room:
            raise ApiError(
                400,
                f"{job['limit']} is {wanted}; {len(ids)} tokens of {field} leave {room} of the context of "
                f"{self._context} tokens.",
                job["limit"],
                "context_length_exceeded",
            )
        return Request(
            prompt_ids=ids,
            max_new_tokens=wanted,
            temperature=job["temperature"],
            top_k=job["top_k"],
            top_p=job["top_p"],
            min_p=job["min_p"],
            presence_penalty=job["presence_penalty"],
            frequency_penalty=job["frequency_penalty"],
            repetition_penalty=job["repetition_penalty"],
            logit_bias=job["logit_bias"],
            logprobs=job["logprobs"],
            stop=tuple(job["stop"]),
            stop_ids=self._chat_stops if "messages" in job else (),
            max_draft=job["max_draft"],
            seed=job["seed"],
        )

    def _chat_ids(self, messages: list[tuple[str, str]]) -> list[int]:
        if self._chat is None:
            raise ApiError(400, f"This target can't chat: {self._no_chat}", "messages", "no_chat_template")
        if messages[-1][0] == "assistant":
            raise ApiError(
                400, "messages end with an assistant's turn; end with the user's.", "messages", "invalid_value"
            )
        try:
            turns = [Message(role, content) for role, content in messages]
            return self._chat.prompt_ids(with_system_prompt(turns, self._system_prompt))
        except DraftlineError as e:
            raise ApiError(400, str(e), "messages", "invalid_value") from None

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        ids = list(self._tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, f"prompt is {prompt!r}; it must hold at least one token.", "prompt", "invalid_value")
        return ids

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [{**self._token(t), "logprob": logprob} for t, logprob in entry.top]
        return {**self._token(entry.token_id), "logprob": entry.logprob, "top_logprobs": top}

    def _token(self, token_id: int) -> dict[str, Any]:
        text, said = self._pieces.of(token_id)
        return {"token": text, "bytes": None if said is None else list(said)}

    def _done(self, done: Completion, request: Request, index: int) -> dict[str, Any]:
        if done.finish_reason not in ("stop", "length"):
            if done.error is not None:
                return _failure(done.error).item()
            return ApiError(503, "The request was cancelled by the server.", code=done.finish_reason).item()
        m = done.metrics
        return {
            "kind": "done",
            "index": index,
            "finish_reason": done.finish_reason,
            # A token that ends turns is the end of the answer, as eos is, and nothing that the client asked for.
            "stop_reason": done.stop_reason if isinstance(done.stop_reason, str) else None,
            "prompt_tokens": len(request.prompt_ids),
            "cached_tokens": m.cached_prompt,
            "completion_tokens": len(done.token_ids),
            "draftline": {
                "tau": round(m.tau, 4),
                "target_steps": m.target_steps,
                "drafted": m.drafted,
                "verified": m.verified,
                "accepted": m.accepted,
                "draft_version": self._draft_version,
            },
        }


def _refusal(e: RequestRefused, job: dict[str, Any]) -> ApiError:
    """The engine's refusal in the client's words: its fields by the API's names, no ids that only the server knows."""
    prompt = "messages" if "messages" in job else "prompt"
    names = {
        "prompt_ids": prompt,
        "max_new_tokens": job["limit"],
        "prompt_ids + max_new_tokens": f"{prompt} + {job['limit']}",
        "max_draft": "speculation.max_tokens",
    }
    if not e.field:
        return ApiError(400, _sentence(e.what), code="invalid_value")
    name = names.get(e.field, e.field)
    return ApiError(400, f"{name} {e.what}", job["limit"] if "+" in name else name, "invalid_value")


def _failure(cause: str) -> ApiError:
    return ApiError(500, f"This answer failed: {cause}", code="error")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
