"""The HTTP surface: OpenAI's endpoints over anything that answers jobs (a Serve handle, or a replica in process)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from pipeline.serving.pieces import TextOffsets
from pipeline.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse, unknown_model


class Backend(Protocol):
    """What answers: see TargetReplica, whose methods these are."""

    async def describe(self) -> dict[str, Any]: ...
    async def health(self) -> dict[str, Any]: ...
    def generate(self, job: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]: ...


def build(backend: Backend) -> FastAPI:
    """The ASGI application: /v1/models, /v1/chat/completions, /v1/completions, /healthz."""
    api = FastAPI(title="draftline", docs_url=None, redoc_url=None, openapi_url=None)

    @api.exception_handler(ApiError)
    async def refused(_: Request, e: ApiError) -> Response:
        headers = {"Retry-After": "1"} if e.status in (429, 503) else None
        return JSONResponse(e.body(), e.status, headers)

    @api.exception_handler(Exception)
    async def failed(_: Request, e: Exception) -> Response:
        return JSONResponse(ApiError(500, f"The server failed: {type(e).__name__}.", code="internal").body(), 500)

    @api.exception_handler(HTTPException)
    async def unknown_route(request: Request, e: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {e.detail}."
        return JSONResponse(ApiError(e.status_code, text).body(), e.status_code)

    @api.get("/healthz")
    async def healthz() -> Response:
        state = await backend.health()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        known = await backend.describe()
        return {"object": "list", "data": [_model(name, known) for name in known["names"]]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        known = await backend.describe()
        if name not in known["names"]:
            raise unknown_model(name, known["names"])
        return _model(name, known)

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(backend, request, ChatRequest)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(backend, request, CompletionRequest)

    return api


def _model(name: str, known: dict[str, Any]) -> dict[str, Any]:
    more = {"root": known["names"][0], "max_model_len": known["max_context"], "draft_version": known["draft_version"]}
    return {"id": name, "object": "model", "created": known["created"], "owned_by": "draftline", **more}


async def _answer(backend: Backend, http: Request, kind: type[ChatRequest | CompletionRequest]) -> Response:
    try:
        body = json.loads(await http.body())
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = e.object[e.start : e.end]
        raise ApiError(400, f"The body holds {half!r}, half of a character: cut texts between characters.") from None
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body is not JSON that can be read: {e}.") from None
    wanted = parse(kind, body)
    items = backend.generate(wanted.job())
    try:
        # The refusals come first, while the status line can still say so.
        accepted = _checked(await anext(items))
        shape = _Shape(kind is ChatRequest, accepted["model"])
        if wanted.streams:
            return _Events(_events(items, shape, wanted.includes_usage, wanted.choices), items)
        whole = await _unless_gone(http, _collect(items, wanted.choices))
    except BaseException:
        await items.aclose()
        raise
    return JSONResponse(shape.whole(whole)) if whole else Response(status_code=499)


@dataclasses.dataclass
class _Choice:
    """One choice of an answer, as it grows: `done` is its last item."""

    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    done: dict[str, Any] = dataclasses.field(default_factory=dict)


async def _collect(items: AsyncIterator[dict[str, Any]], count: int) -> list[_Choice]:
    choices = [_Choice() for _ in range(count)]
    async for item in items:
        choice = choices[_checked(item)["index"]]
        if item["kind"] == "done":
            choice.done = item
            continue
        choice.text += item["text"]
        if item["logprobs"] is not None:
            choice.logprobs = [*(choice.logprobs or []), *item["logprobs"]]
    if not all(c.done for c in choices):
        raise ApiError(500, "The answer ended before its end; try again.", code="truncated")
    return choices


async def _unless_gone(http: Request, work: Any) -> Any:
    """The result of `work`, or None when the client hung up first (then the work is cancelled)."""

    receive = _until_gone(http.receive)

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _until_gone(receive: Receive) -> Receive:
    """`receive`, whose failure means that the client is gone: Serve raises where ASGI servers send a message."""

    async def wrapped() -> Message:
        try:
            return await receive()
        except Exception:
            return {"type": "http.disconnect"}

    return wrapped


async def _events(items: AsyncIterator[dict[str, Any]], shape: _Shape, usage: bool, count: int) -> AsyncIterator[str]:
    offsets = [TextOffsets() for _ in range(count)]
    done: list[dict[str, Any]] = []
    if shape.chat:
        for i in range(count):
            yield _sse(shape.chunk(i, {"role": "assistant", "content": ""}, usage=usage))
    try:
        async for item in items:
            i = _checked(item)["index"]
            if item["kind"] == "text":
                said = shape.logprobs(item["logprobs"], offsets[i])
                yield _sse(shape.chunk(i, {"content": item["text"]}, logprobs=said, usage=usage))
                continue
            done.append(item)
            yield _sse(shape.chunk(i, {}, done=item, usage=usage))
        if usage:
            yield _sse(shape.usage_chunk(done))
    except ApiError as e:
        yield _sse(e.body())  # the status line is long sent
    yield "data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _checked(item: dict[str, Any]) -> dict[str, Any]:
    if item["kind"] == "error":
        raise ApiError(item["status"], item["message"], item["param"], item["code"])
    return item


class _Events(StreamingResponse):
    """Server-sent events that close their source whichever way the response ends, so a lost client cancels it."""

    def __init__(self, events: AsyncIterator[str], source: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, _until_gone(receive), send)
        finally:
            with contextlib.suppress(RuntimeError):  # "already running": its consumer was cancelled and closes it
                await self._source.aclose()


class _Shape:
    """OpenAI's JSON for one answer."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[_Choice]) -> dict[str, Any]:
        done = [c.done for c in choices]
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [
                {
                    "index": i,
                    **({"message": {"role": "assistant", "content": c.text}} if self.chat else {"text": c.text}),
                    "logprobs": self.logprobs(c.logprobs, TextOffsets()),
                    "finish_reason": c.done["finish_reason"],
                    "stop_reason": c.done["stop_reason"],
                }
                for i, c in enumerate(choices)
            ],
            "usage": _usage(done),
            "draftline": _worth(done),
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        done: dict[str, Any] | None = None,
        usage: bool = False,
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": None}
        out = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if usage:
            out["usage"] = None
        if done is not None:
            choice |= {"finish_reason": done["finish_reason"], "stop_reason": done["stop_reason"]}
            out["draftline"] = done["draftline"]
        return out

    def usage_chunk(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {"usage": _usage(done), "draftline": _worth(done)}
        return {**self._head, "object": self._chunk_kind, "choices": [], **extra}

    def logprobs(self, entries: list[dict[str, Any]] | None, offsets: TextOffsets) -> dict[str, Any] | None:
        """What tokens' entries (see TargetReplica.generate) become.

        Args:
            offsets: of the choice's text, which the completions endpoint tells; goes on with these tokens.
        """
        if entries is None:
            return None
        if self.chat:
            return {"content": entries, "refusal": None}
        return {
            "tokens": [e["token"] for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            # By text, as the API has it, with the token itself; of two tokens with one text the likelier counts.
            "top_logprobs": [{t["token"]: t["logprob"] for t in [e, *reversed(e["top_logprobs"])]} for e in entries],
            "text_offset": [offsets.of(e) for e in entries],
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def _usage(done: list[dict[str, Any]]) -> dict[str, Any]:
    prompt, answer = done[0]["prompt_tokens"], sum(d["completion_tokens"] for d in done)
    # The prompt counts once, whatever the choices: what one of them had to compute was not cached.
    cached = min(d["cached_tokens"] for d in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _worth(done: list[dict[str, Any]]) -> dict[str, Any]:
    """What the draft was worth over all choices."""
    each = [d["draftline"] for d in done]
    steps = sum(e["target_steps"] for e in each)
    sums = {k: sum(e[k] for e in each) for k in ("target_steps", "drafted", "verified", "accepted")}
    tau = sum(e["tau"] * e["target_steps"] for e in each) / steps if steps else 1.0
    return {"tau": round(tau, 4), **sums, "draft_version": each[0]["draft_version"]}
