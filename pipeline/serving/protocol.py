"""What a request may say, what it may not, and OpenAI's shapes of answers and errors.

Nothing a client asks for is dropped silently: a field is honoured, accepted because it changes nothing, or refused
with its name and value.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftline_kernels import COLDEST
from pipeline.decoding.request import LEAST_REPETITION, MOST_LOGPROBS, MOST_TOP_K
from pipeline.errors import nearest

MOST_CHOICES = 16
# Fields of the API that this server has one value for: accepted with that value only.
FIXED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
# Fields that never change the text.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                  "parallel_tool_calls"}  # fmt: skip


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def item(self) -> dict[str, Any]:
        """The plain form in which a replica's answer carries it (see TargetReplica.generate)."""
        return {
            "kind": "error", "status": self.status, "message": self.message, "param": self.param, "code": self.code
        }  # fmt: skip


def unknown_model(name: str, known: list[str]) -> ApiError:
    """404 that says what there is."""
    names = ", ".join(repr(n) for n in known)
    return ApiError(
        404, f"The model {name!r} does not exist here; this server has {names}.", "model", "model_not_found"
    )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Speculation(_Strict):
    """Drafting at most so many tokens a step for this request."""

    max_tokens: int = Field(ge=1)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class Sampled(_Strict):
    """Fields that both endpoints share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_TOP_K)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=LEAST_REPETITION, le=10)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    speculation: Literal["off", "draft"] | Speculation | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def job(self) -> dict[str, Any]:
        """The plain form that goes to the target's replica; an absent seed becomes a random one. `limit` is the name by
        which the client gave max_tokens."""
        return {
            "model": self.model,
            "temperature": 1.0 if self.temperature is None else float(self.temperature),
            "top_p": 1.0 if self.top_p is None else float(self.top_p),
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            "logit_bias": {int(t): float(b) for t, b in (self.logit_bias or {}).items()},
            "seed": secrets.randbits(62) if self.seed is None else self.seed & (2**63 - 1),
            "stop": [self.stop] if isinstance(self.stop, str) else list(self.stop or []),
            "max_tokens": self.max_tokens,
            "limit": "max_tokens",
            "n": self.choices,
            "logprobs": None,
            "max_draft": self._max_draft,
            # As the client gave it: a server without a draft can't do what it asks.
            "speculation": self.speculation.model_dump()
            if isinstance(self.speculation, Speculation)
            else self.speculation,
        }

    @property
    def _max_draft(self) -> int | None:
        if isinstance(self.speculation, Speculation):
            return self.speculation.max_tokens
        return 0 if self.speculation == "off" else None


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def job(self) -> dict[str, Any]:
        job = super().job()
        if self.max_completion_tokens is not None:
            job["max_tokens"], job["limit"] = self.max_completion_tokens, "max_completion_tokens"
        if self.logprobs:
            job["logprobs"] = self.top_logprobs or 0
        roles = {"developer": "system"}  # OpenAI's newer name for it
        job["messages"] = [(roles.get(m.role, m.role), m.text()) for m in self.messages]
        return job


class CompletionRequest(Sampled):
    prompt: str | list[int] | list[str]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def job(self) -> dict[str, Any]:
        job = super().job()
        job["prompt"] = self.prompt[0] if isinstance(self.prompt, list) and self._texts else self.prompt
        # The API's own default for this endpoint.
        job["max_tokens"] = 16 if self.max_tokens is None else self.max_tokens
        job["logprobs"] = self.logprobs
        return job

    @property
    def _texts(self) -> bool:
        return bool(self.prompt) and isinstance(self.prompt[0], str)


def parse(kind: type[ChatRequest | CompletionRequest], body: Any) -> ChatRequest | CompletionRequest:
    """Reads a request body.

    Raises:
        ApiError: 400 with the field's name and value.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"The body is {_cut(body)}; it must be a JSON object.")
    fields = {}
    for name, value in body.items():
        if name in FIXED:
            if value is not None and value not in FIXED[name]:
                only = f"only {FIXED[name][0]!r}" if FIXED[name] else "no value of it"
                raise ApiError(400, f"{name} is {_cut(value)}; this server supports {only}.", name, "unsupported_value")
        elif name not in WITHOUT_EFFECT:
            fields[name] = value
    unknown = sorted(set(fields) - set(kind.model_fields))
    if unknown:
        name = unknown[0]
        hint = nearest(name, [*kind.model_fields, *FIXED])
        raise ApiError(400, f"Unknown field {name} with value {_cut(fields[name])}.{hint}", name, "unknown_parameter")
    try:
        request = kind.model_validate(fields)
    except ValidationError as e:
        found = [error for error in e.errors() if error["loc"][0] == e.errors()[0]["loc"][0]]
        first = max(found, key=lambda error: len(error["loc"]))  # of a union, the kind that fits furthest
        name = _path(first["loc"])
        if first["type"] == "missing":
            raise ApiError(400, f"{name} is missing.", name, "missing_required_parameter") from None
        what = _rule(first["msg"])
        raise ApiError(400, f"{name} is {_cut(first['input'])}; it {what}.", name, "invalid_value") from None
    _check_stop(request)
    _check_bias(request.logit_bias or {})
    if request.choices > 1 and request.temperature is not None and request.temperature < COLDEST:
        raise ApiError(
            400,
            f"n is {request.n} and temperature is {request.temperature:g}, which gives the same text each time; ask "
            "for n=1, or raise temperature.",
            "n",
            "invalid_value",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options is set, but stream is not true; set it to true.", "stream_options", "invalid_value"
        )
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            400,
            f"top_logprobs is {request.top_logprobs}, but logprobs is not true; set it to true.",
            "top_logprobs",
            "invalid_value",
        )
    if isinstance(request, ChatRequest) and len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        raise ApiError(
            400,
            f"max_tokens is {request.max_tokens} and max_completion_tokens is {request.max_completion_tokens}; they "
            "mean the same: give one of them.",
            "max_tokens",
            "invalid_value",
        )
    prompt = request.prompt if isinstance(request, CompletionRequest) else ""
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str):
        raise ApiError(400, f"prompt holds {len(prompt)} texts; send one request for each.", "prompt", "invalid_value")
    return request


def _check_stop(request: Sampled) -> None:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 4:
        raise ApiError(400, f"stop holds {len(stop)} strings; it must be 4 or fewer.", "stop", "invalid_value")
    if "" in stop:
        raise ApiError(400, "stop holds '', which every text contains; leave it out.", "stop", "invalid_value")


def _check_bias(bias: dict[str, float]) -> None:
    named: dict[int, str] = {}
    for token in bias:
        if not token.isdecimal() or len(token) > 10:
            raise ApiError(400, f"logit_bias has {token!r}; its keys must be token ids.", "logit_bias", "invalid_value")
        if (other := named.setdefault(int(token), token)) != token:
            raise ApiError(
                400,
                f"logit_bias has {other!r} and {token!r}, which are the same token; give one of them.",
                "logit_bias",
                "invalid_value",
            )


def _path(location: tuple[int | str, ...]) -> str:
    # Pydantic appends the tried type for unions (`stop.str`); clients know the field only.
    types = ("str", "int", "Speculation")
    known = [p for p in location if isinstance(p, int) or not (p in types or p.startswith(("list[", "literal[")))]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in known).lstrip(".")


def _rule(message: str) -> str:
    text = message[0].lower() + message[1:]
    return text.replace("input should be", "must be").replace("input should have", "must have")


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
