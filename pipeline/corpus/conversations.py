"""Reads conversations and prompts from JSON lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`).

A conversation is `{"messages": [{"role": "system|user|assistant", "content": str}, ...], "source": str?}`. An
optional system message comes first, then user and assistant take turns. Rows that are not so are set aside with
their line number and the reason (`Quarantined`); the rest goes on.

What regeneration adds to an assistant message: `finish_reason` (other than "stop": the target never produced the
end of this turn) and `token_ids` (the exact response, where its text alone would give other tokens).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import zstandard

from pipeline.errors import DraftlineError

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
RAW_LIMIT = 2000
_CHUNK = 1 << 18

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """One turn. `finish_reason` and `token_ids` are only set on assistant turns, by regeneration.

    `added`: it is target.system_prompt, and stands in nobody's file or request.
    """

    role: str
    content: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    added: bool = field(default=False, compare=False)

    @property
    def ended(self) -> bool:
        """Whether the end-of-turn token belongs to what was said (false when generation was cut short)."""
        return self.finish_reason in (None, "stop")

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; unset fields are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.finish_reason is not None:
            out["finish_reason"] = self.finish_reason
        if self.token_ids is not None:
            out["token_ids"] = list(self.token_ids)
        return out


@dataclass(frozen=True)
class Conversation:
    """A valid conversation; `row` is its 1-based line number in the file it came from (0: not from a file)."""

    messages: tuple[Message, ...]
    source: str = ""
    row: int = 0


@dataclass(frozen=True)
class Quarantined:
    """A row set aside: its 1-based line number, what is wrong with it, and its text (first 2000 characters)."""

    row: int
    reason: str
    raw: str


class InvalidRow(ValueError):
    """Why a row is not a conversation (or a prompt); becomes `Quarantined.reason`."""


def read_conversations(path: Path | str, quarantine: list[Quarantined]) -> Iterator[Conversation]:
    """Streams the conversations of a JSON-lines file; blank lines are passed over.

    Args:
        quarantine: bad rows are appended to it as they are met.

    Raises:
        DraftlineError: no such file, an unknown suffix, a truncated or damaged compressed file, an empty file, or
            a file in which every row is bad.
    """
    return _read(Path(path), quarantine, parse_conversation, "conversation")


def read_prompts(path: Path | str, quarantine: list[Quarantined], limit: int = 0) -> Iterator[Conversation]:
    """Streams prompts to be answered: conversations whose last message is the user's.

    Accepts `{"messages": [... ending with user]}`, `{"prompt": str}` and `{"turns": [str, ...]}` (its first turn
    is the prompt). A conversation that ends with an assistant turn is asked again: that turn is left out.

    Args:
        quarantine: bad rows are appended to it as they are met.
        limit: stop after this many prompts; 0 reads all.

    Raises:
        DraftlineError: as `read_conversations`.
    """
    for count, prompt in enumerate(_read(Path(path), quarantine, parse_prompt, "prompt"), start=1):
        yield prompt
        if count == limit:
            return


def parse_conversation(value: Any, row: int, default_source: str = "") -> Conversation:
    """Validates one decoded JSON row.

    Raises:
        InvalidRow: it is not a conversation; the message says why.
    """
    messages = _messages(_object(value))
    if not any(m.role == "assistant" for m in messages):
        raise InvalidRow("no assistant turn: nothing to learn from")
    return Conversation(messages, _source(value, default_source), row)


def parse_prompt(value: Any, row: int, default_source: str = "") -> Conversation:
    """Validates one decoded JSON row of a prompt file (see `read_prompts`).

    Raises:
        InvalidRow: it holds no prompt; the message says why.
    """
    value = _object(value)
    source = _source(value, default_source)
    if "messages" in value:
        messages = _messages(value)
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        return Conversation(messages, source, row)
    if "prompt" in value:
        name, content = "prompt", value["prompt"]
    elif "turns" in value:
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            raise InvalidRow(f"turns is {_kind(turns)}, not a list with at least one string")
        name, content = "turns[0]", turns[0]
    else:
        raise InvalidRow(f"none of messages, prompt or turns among its keys {sorted(value)}")
    return Conversation((Message("user", _text(content, name)),), source, row)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The messages with this system message first, unless they have one of their own (or it is empty)."""
    if not system_prompt or messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system_prompt, added=True), *messages)


def place_of(messages: Sequence[Message], index: int) -> str:
    """What an error calls a message: as whoever gave them counts, who knows nothing of a system prompt put first."""
    if messages[index].added:
        return "target.system_prompt"
    return f"messages[{index - messages[0].added}]"


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRow(f"{_kind(value)}, not a JSON object")
    return value


def _source(value: dict[str, Any], default: str) -> str:
    given = value.get("source", value.get("category"))
    if given is None:
        return default
    return _text(given, "source")


def _messages(value: dict[str, Any]) -> tuple[Message, ...]:
    if "messages" not in value:
        raise InvalidRow(f"messages is missing (keys: {sorted(value)})")
    raw = value["messages"]
    if not isinstance(raw, list):
        raise InvalidRow(f"messages is {_kind(raw)}, not a list")
    if not raw:
        raise InvalidRow("messages is empty")
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(raw))
    turns = messages[1:] if messages[0].role == "system" else messages
    offset = len(messages) - len(turns)
    if not turns:
        raise InvalidRow("only a system message: no user turn")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role == expected:
            continue
        where = f"messages[{i + offset}]"
        if message.role == "system":
            raise InvalidRow(f"{where} is a system message after the first message")
        if i == 0:
            raise InvalidRow(f"{where}: the first turn is the assistant's, not the user's")
        raise InvalidRow(f"{where}: two {message.role} turns in a row")
    return messages


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise InvalidRow(f"{where} is {_kind(raw)}, not an object")
    role = raw.get("role")
    if role not in ROLES:
        raise InvalidRow(f"{where}: unknown role {role!r} (one of {', '.join(ROLES)})")
    if "content" not in raw:
        raise InvalidRow(f"{where}: content is missing")
    content = _text(raw["content"], f"{where}: {role} content", may_be_empty=role == "system")
    if role != "assistant":
        return Message(role, content)
    reason = raw.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise InvalidRow(f"{where}: finish_reason is {_kind(reason)}, not a string")
    ids = raw.get("token_ids")
    if ids is None:
        return Message(role, content, reason)
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise InvalidRow(f"{where}: token_ids is not a list of token ids")
    return Message(role, content, reason, tuple(ids))


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"{name} is {_kind(value)}, not a string")
    if not may_be_empty and not value.strip():
        raise InvalidRow(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        raise InvalidRow(f"{name} holds a lone surrogate, which is not text") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _read(path: Path, quarantine: list[Quarantined], parse: Callable[[Any, int, str], T], noun: str) -> Iterator[T]:
    good = 0
    reasons: Counter[str] = Counter()
    default_source = path.name.split(".")[0]
    for row, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            item = parse(_decode(line), row, default_source)
        except InvalidRow as e:
            reasons[str(e)] += 1
            quarantine.append(Quarantined(row, str(e), line.decode("utf-8", "replace").rstrip("\n")[:RAW_LIMIT]))
            continue
        good += 1
        yield item
    if good:
        return
    if not reasons:
        raise DraftlineError(f"{path} is empty: it holds no {noun}. Give a file with one JSON object per line.")
    reason, n = reasons.most_common(1)[0]
    total = reasons.total()
    raise DraftlineError(
        f"Every row of {path} was refused ({total} of {total}); {n} because: {reason}. "
        'A row looks like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
    )


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise InvalidRow(f"not UTF-8 (byte {e.start})") from None
    except RecursionError:
        raise InvalidRow("not JSON: nested too deeply") from None
    except ValueError as e:
        raise InvalidRow(f"not JSON: {e}") from None


def _lines(path: Path) -> Iterator[bytes]:
    if not path.name.endswith(SUFFIXES):
        raise DraftlineError(f"{path} is not a file of JSON lines: its name must end with {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DraftlineError(f"No such file: {path}.")
    pending: list[bytes] = []
    try:
        for chunk in _chunks(path):
            head, *rest = chunk.split(b"\n")
            pending.append(head)
            if rest:
                yield b"".join(pending)
                yield from rest[:-1]
                pending = [rest[-1]]
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as e:
        raise DraftlineError(f"{path} is truncated or damaged ({e}). Fetch or make it again.") from None
    if tail := b"".join(pending):
        yield tail


def _chunks(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompresses frame after frame; zstandard's own stream_reader takes a truncated frame for the end."""
    frame = None
    with path.open("rb") as f:
        while data := f.read(_CHUNK):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if out := frame.decompress(data):
                    yield out
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the last compressed frame is incomplete")
