"""The HTTP surface: OpenAI's endpoints over anything that answers jobs (a Serve handle, or a replica in process)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

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
    except ValueError as e:
        raise ApiError(400, f"The body is not JSON: {e}.") from None
    wanted = parse(kind, body)
    items = backend.generate(wanted.job())
    try:
        # The refusals come first, while the status line can still say so.
        accepted = _checked(await anext(items))
        shape = _Shape(kind is ChatRequest, accepted["model"])
        if wanted.streams:
            return _Events(_events(items, shape, wanted.includes_usage), items)
        whole = await _unless_gone(http, _collect(items))
    except BaseException:
        await items.aclose()
        raise
    return JSONResponse(shape.whole(*whole)) if whole else Response(status_code=499)


async def _collect(items: AsyncIterator[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    text = ""
    async for item in items:
        if _checked(item)["kind"] == "done":
            return text, item
        text += item["text"]
    raise ApiError(500, "The answer ended before its end; try again.", code="truncated")


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


async def _events(items: AsyncIterator[dict[str, Any]], shape: _Shape, usage: bool) -> AsyncIterator[str]:
    if shape.chat:
        yield _sse(shape.chunk({"role": "assistant", "content": ""}, usage=usage))
    try:
        async for item in items:
            if _checked(item)["kind"] == "text":
                yield _sse(shape.chunk({"content": item["text"]}, usage=usage))
                continue
            yield _sse(shape.chunk({}, item["finish_reason"], item["draftline"], usage))
            if usage:
                yield _sse(shape.usage_chunk(item))
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

    def whole(self, text: str, done: dict[str, Any]) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": done["finish_reason"]}
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": [choice],
            "usage": _usage(done),
            "draftline": done["draftline"],
        }

    def chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        draftline: dict[str, Any] | None = None,
        usage: bool = False,
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        out = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if usage:
            out["usage"] = None
        if draftline is not None:
            out["draftline"] = draftline
        return out

    def usage_chunk(self, done: dict[str, Any]) -> dict[str, Any]:
        extra = {"usage": _usage(done), "draftline": done["draftline"]}
        return {**self._head, "object": self._chunk_kind, "choices": [], **extra}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def _usage(done: dict[str, Any]) -> dict[str, int]:
    prompt, answer = done["prompt_tokens"], done["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
