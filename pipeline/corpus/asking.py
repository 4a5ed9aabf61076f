"""Prompts -> conversations in the target's own words.

A draft learns to foresee one target, so what it learns from should be what that target says: under its own chat
template, system prompt, temperature and length limit. `Regenerator` is the callable that an actor runs over batches
of prompts (any map over batches will do; nothing here knows which), `answers.write_answers` makes the files:

    rows = prompt_rows("prompts.jsonl")            # {"row", "messages", "source"}
    answered = Regenerator(target, engine, settings, cache_dir)(batch)
    counts, info = write_answers(folder, rows_of(answered))

The exact tokens survive the way through text: where the text of a response would be tokenized otherwise than the
target produced it, the response keeps its `token_ids`, and where the target was cut short the response says so
(`finish_reason`), so that no end of turn is learned that the target never produced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.corpus.conversations import Conversation, Message, Quarantined, read_prompts, with_system_prompt
from pipeline.corpus.rows import ChatFormat, RowError
from pipeline.errors import DraftlineError

if TYPE_CHECKING:
    from pipeline.config import EngineConfig, TargetConfig
    from pipeline.decoding import Completion, Engine, Request

COLUMNS = (
    "row",
    "messages",
    "source",
    "finish_reason",
    "error",
    "retry",
    "prompt_tokens",
    "response_tokens",
    "clipped",
)
_NUMBERS = ("row", "retry", "prompt_tokens", "response_tokens", "clipped")


@dataclass(frozen=True)
class ResponseSettings:
    """How the target answers: temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def prompt_rows(path: Path | str, quarantine: list[Quarantined], limit: int = 0) -> Iterator[dict[str, Any]]:
    """Prompts of a file as flat rows: row (line number), messages (a JSON string), source.

    Messages travel as one string because nested columns come back from Arrow with keys the row never had.

    Raises:
        DraftlineError: as `read_prompts`.
    """
    for prompt in read_prompts(path, quarantine, limit):
        messages = json.dumps([m.as_dict() for m in prompt.messages], ensure_ascii=False)
        yield {"row": prompt.row, "messages": messages, "source": prompt.source}


class Regenerator:
    """Answers batches of prompts with the target; loads target and engine at the first batch.

    Args:
        target: which target, with its chat template and system prompt.
        engine: sizes of the engine; prompts are decoded `max_requests` at a time.
        settings: sampling; each prompt's seed derives from `settings.seed` and the prompt's own text, so a prompt
            gets the same answer whatever it is batched with and wherever it stands in the file.
        cache_dir: where the target is kept.
        load: makes (tokenizer, engine); given by tests. Default: `pipeline.target` and the plain engine.
    """

    def __init__(
        self,
        target: TargetConfig,
        engine: EngineConfig,
        settings: ResponseSettings,
        cache_dir: Path | str,
        *,
        load: Callable[[], tuple[Any, Engine]] | None = None,
    ):
        self.settings = settings
        self.system_prompt = target.system_prompt
        self._load = load or (lambda: _load_engine(target, engine, Path(cache_dir)))
        self._engine: Any = None
        self._chat: ChatFormat | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers a batch.

        Args:
            batch: columns row int64[N], messages object[N] (JSON lists ending with a user turn), source object[N].

        Returns:
            The same columns in the same order, messages with the response, and finish_reason ("stop", "length";
            "other_stop": an eos token that is not the template's end of turn), error ("" where there is a response),
            retry int64[N] (1 where it was the engine that failed or that had too few pages, for the prompt or for the
            end of the answer, which is there as far as it goes: another time it may answer, which a prompt that is too
            long or whose answer is empty never does), prompt_tokens and response_tokens int64[N] (end-of-turn token
            included), clipped int64[N]: 1 where the engine (`most_tokens`: max_context, or less where its pages hold
            less) left less room than max_new_tokens. A prompt that fails keeps its messages and says why in `error`;
            the others are answered.

        Raises:
            TemplateError: the target's chat template cannot mark assistant turns (no prompt could be answered).
        """
        chat, engine = self._ready()
        rows = [
            {"row": int(row), "messages": str(messages), "source": str(source)}
            for row, messages, source in zip(batch["row"], batch["messages"], batch["source"], strict=True)
        ]
        prompts: dict[int, tuple[Conversation, Request]] = {}
        for i, row in enumerate(rows):
            row.update(finish_reason="", error="", retry=0, prompt_tokens=0, response_tokens=0, clipped=0)
            try:
                prompts[i] = self._request(chat, engine, row)
            except (DraftlineError, ValueError) as e:
                row["error"] = str(e)
        completions = self._decode([request for _, request in prompts.values()])
        for (i, (prompt, request)), completion in zip(prompts.items(), completions, strict=True):
            rows[i]["prompt_tokens"] = len(request.prompt_ids)
            rows[i]["clipped"] = int(request.max_new_tokens < self.settings.max_new_tokens)
            if isinstance(completion, str):
                rows[i].update(error=completion, retry=1)
                continue
            if completion.finish_reason not in ("stop", "length"):
                said = completion.error or f"decoding ended with {completion.finish_reason!r}"
                rows[i].update(error=said, retry=1)
                continue
            # What max_context alone would have left; how many pages there are is no part of what the artifact is of.
            room = min(self.settings.max_new_tokens, engine.config.max_context - len(request.prompt_ids))
            rows[i]["retry"] = int(completion.finish_reason == "length" and request.max_new_tokens < room)
            try:
                answer = _answer(chat, prompt, completion, self._stop_ids)
            except DraftlineError as e:
                rows[i]["error"] = str(e)
                continue
            rows[i]["messages"] = json.dumps([m.as_dict() for m in (*prompt.messages, answer)], ensure_ascii=False)
            rows[i]["finish_reason"] = answer.finish_reason or "stop"
            rows[i]["response_tokens"] = len(completion.token_ids)
        return {
            name: np.array(
                [row[name] for row in rows],
                dtype=np.int64 if name in _NUMBERS else object,
            )
            for name in COLUMNS
        }

    def _ready(self) -> tuple[ChatFormat, Any]:
        if self._engine is None:
            tokenizer, self._engine = self._load()
            self._chat = self._chat or ChatFormat(tokenizer)
            self._stop_ids = self._chat.stop_ids(self._engine.target.eos_ids)
        assert self._chat is not None
        return self._chat, self._engine

    def _request(self, chat: ChatFormat, engine: Any, row: dict[str, Any]) -> tuple[Conversation, Request]:
        from pipeline.decoding import Request

        messages = tuple(Message(m["role"], m["content"]) for m in json.loads(row["messages"]))
        prompt = Conversation(with_system_prompt(messages, self.system_prompt), row["source"], row["row"])
        prompt_ids = chat.prompt_ids(prompt.messages)
        most, context = engine.most_tokens, engine.config.max_context
        room = most - len(prompt_ids)
        if room < 1:
            # Memory is no part of what the artifact is made from: with more of it the next run may answer.
            row["retry"] = int(len(prompt_ids) < context)
            where = f"engine.max_context={context}"
            if row["retry"]:
                where = f"the {most} tokens that the KV pool holds: raise engine.kv_gib, or free memory where it is 0"
            raise RowError(f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer in {where}")
        settings = self.settings
        request = Request(
            prompt_ids,
            max_new_tokens=min(settings.max_new_tokens, room),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=prompt_seed(settings.seed, prompt.messages),
            stop_ids=self._stop_ids,
        )
        request.check(engine.target.vocab_size, most)
        return prompt, request

    def _decode(self, requests: list[Request]) -> list[Completion | str]:
        """Completions in order; where one request makes the engine fail, its error's text stands instead."""
        try:
            return list(self._ready()[1].generate(requests))
        except Exception as e:
            # An engine that failed in mid-step holds unknown state: each attempt after that gets a fresh one.
            self._engine = None
            if len(requests) == 1:
                return [f"{type(e).__name__}: {e}"]
        return [answer for request in requests for answer in self._decode([request])]


def prompt_seed(seed: int, messages: Sequence[Message]) -> int:
    """A prompt's own seed in [0, 2^63): from the run's seed and the prompt's text."""
    text = json.dumps([seed, [[m.role, m.content] for m in messages]], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rows_of(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The rows of a `Regenerator` result, as plain values."""
    for i in range(len(batch["row"])):
        yield {name: batch[name][i].item() if batch[name].dtype != object else batch[name][i] for name in COLUMNS}


def _answer(chat: ChatFormat, prompt: Conversation, completion: Completion, stop_ids: Sequence[int]) -> Message:
    """The response as a message from which `ChatFormat.row` makes exactly the tokens the target produced."""
    spoken = list(completion.token_ids)
    reason = completion.finish_reason
    if reason == "stop" and spoken and spoken[-1] in stop_ids:
        reason = "stop" if spoken.pop() == chat.end_of_turn else "other_stop"
    text = chat.decode(spoken)
    if not text.strip():
        raise RowError("the target's response is empty")
    shown = Message("assistant", text, None if reason == "stop" else reason)
    exact = Message("assistant", text, shown.finish_reason, tuple(spoken))
    wanted = chat.row(Conversation((*prompt.messages, exact))).sample_id
    try:
        if chat.row(Conversation((*prompt.messages, shown))).sample_id == wanted:
            return shown
    except RowError:
        pass  # its text cannot be marked (it merges with the prompt, or spells a special token): keep the tokens
    return exact


def _load_engine(target: TargetConfig, engine: EngineConfig, cache_dir: Path) -> tuple[Any, Engine]:
    from pipeline.decoding import Engine
    from pipeline.target import load_target

    loaded = load_target(target, cache_dir)
    return loaded.tokenizer, Engine(loaded, engine)
