"""The target answers prompts in its own words, token for token, and one prompt's trouble stays its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import EngineConfig, TargetConfig
from pipeline.corpus.answers import write_answers
from pipeline.corpus.asking import (
    Regenerator,
    ResponseSettings,
    prompt_rows,
    prompt_seed,
    rows_of,
)
from pipeline.corpus.conversations import Message, parse_conversation
from pipeline.corpus.rows import ChatFormat
from pipeline.decoding import Completion, Engine, Request, RequestMetrics, make_proposer
from pipeline.target import load_target
from tests.corpus.chats import chat, write_lines
from tests.decoding.samples import engine_of

END = "<|im_end|>"
SETTINGS = ResponseSettings(temperature=1.0, max_new_tokens=24, seed=7)
TARGET = TargetConfig(path="tiny")


@dataclass
class ScriptedEngine:
    """Stands where the engine does: `say` gives the tokens for a request (or raises); the engine's own limits hold."""

    tokenizer: Any
    say: Callable[[Request], list[int]]
    max_context: int = 512
    pool: int = 512

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(max_context=self.max_context, max_requests=4)
        self.most_tokens = min(self.max_context, self.pool)
        self.target = SimpleNamespace(eos_ids=[2, 0], vocab_size=len(self.tokenizer))
        self.seen: list[Request] = []

    def generate(self, requests: list[Request]) -> list[Completion]:
        done = []
        for request in requests:
            self.seen.append(request)
            ids = self.say(request)[: request.max_new_tokens]
            reason = "stop" if ids and ids[-1] in request.stop_ids else "length"
            done.append(Completion(request.id, ids, reason, RequestMetrics()))
        return done


def _regenerate(
    path: Path, tokenizer, say: Callable[[Request], list[int]], target: TargetConfig = TARGET, **limits: int
) -> tuple[list[dict[str, Any]], list[ScriptedEngine]]:
    engines: list[ScriptedEngine] = []

    def load() -> tuple[Any, Any]:
        engines.append(ScriptedEngine(tokenizer, say, **limits))
        return tokenizer, engines[-1]

    rows = list(prompt_rows(path, []))
    batch = {
        "row": np.array([r["row"] for r in rows]),
        "messages": np.array([r["messages"] for r in rows], dtype=object),
        "source": np.array([r["source"] for r in rows], dtype=object),
    }
    answered = Regenerator(target, EngineConfig(), SETTINGS, path.parent, load=load)(batch)
    return list(rows_of(answered)), engines


def _asked(tokenizer, request: Request) -> str:
    return tokenizer.decode(request.prompt_ids).split("user\n")[-1].split(END)[0]


def _row(tokenizer, answered: dict[str, Any]):
    conversation = parse_conversation({"messages": json.loads(answered["messages"])}, 1)
    return ChatFormat(tokenizer).row(conversation)


@pytest.mark.parametrize(
    ("response", "keeps_ids", "reason"),
    [
        ("The answer is two." + END, False, "stop"),
        ("The answer is " * 20, False, "length"),  # cut at 24 tokens
        (["H", "e", "l", "l", "o", END], True, "stop"),  # spelled in letters: its text would be read as fewer tokens
        (["    ", "return", END], True, "stop"),  # joins the generation prompt's newline
        (["Hi", "<|im_start|>", "Hi", END], True, "stop"),  # a special token in the middle
        (["caf", "Ã"], True, "length"),  # cut within a character
        ("Bye" + "<|endoftext|>", False, "other_stop"),
    ],
)
def test_the_row_holds_exactly_the_tokens_the_target_produced(tmp_path, tokenizer, response, keeps_ids, reason) -> None:
    pieces = [response] if isinstance(response, str) else response
    ids = [i for piece in pieces for i in _ids(tokenizer, piece)][:24]
    path = write_lines(tmp_path / "ask.jsonl", [{"prompt": "Hi"}])
    (answered,), _ = _regenerate(path, tokenizer, lambda _: ids)
    assert (answered["error"], answered["finish_reason"]) == ("", reason)
    message = json.loads(answered["messages"])[-1]
    assert ("token_ids" in message) == keeps_ids
    row = _row(tokenizer, answered)
    produced = ids[:-1] if reason == "other_stop" else ids
    assert row.input_ids[row.loss_mask].tolist() == produced
    assert row.input_ids[: row.prompt_length].tolist() == ChatFormat(tokenizer).prompt_ids(
        parse_conversation(chat("Hi", "x"), 1).messages[:1]
    )
    assert answered["response_tokens"] == len(ids) and answered["prompt_tokens"] == row.prompt_length


def _ids(tokenizer, piece: str) -> list[int]:
    known = tokenizer.convert_tokens_to_ids(piece)
    return [known] if piece in tokenizer.get_vocab() else tokenizer(piece, add_special_tokens=False)["input_ids"]


def test_one_prompts_trouble_does_not_touch_the_others(tmp_path, chatml) -> None:
    answer = chatml("It is so." + END)["input_ids"]

    def say(request: Request) -> list[int]:
        asked = _asked(chatml, request)
        if asked == "crash":
            raise RuntimeError("CUDA error: device-side assert")
        return [2] if asked == "silence" else answer

    prompts = ["fine", "crash", "spells " + END, "long " * 400, "silence", "fine too"]
    path = write_lines(tmp_path / "ask.jsonl", [{"prompt": p} for p in prompts])
    rows, engines = _regenerate(path, chatml, say)
    assert [r["row"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["error"] == "" for r in rows] == [True, False, False, False, False, True]
    assert [r["retry"] for r in rows] == [0, 1, 0, 0, 0, 0], "the engine's failure alone may pass"
    assert rows[1]["error"] == "RuntimeError: CUDA error: device-side assert"
    assert "spells the special token" in rows[2]["error"]
    assert "leaves no room for an answer in engine.max_context=512" in rows[3]["error"]
    assert rows[4]["error"] == "the target's response is empty"
    assert len(json.loads(rows[1]["messages"])) == 1
    for row in (rows[0], rows[5]):
        assert json.loads(row["messages"])[-1] == {"role": "assistant", "content": "It is so."}
    # The batch failed once and the prompt failed alone: neither engine is used again.
    assert len(engines) == 3


def test_a_prompt_gets_its_own_seed_wherever_it_stands(tmp_path, chatml) -> None:
    def seeds(prompts: list[str]) -> dict[str, int]:
        path = write_lines(tmp_path / "ask.jsonl", [{"prompt": p} for p in prompts])
        _, (engine,) = _regenerate(path, chatml, lambda _: chatml("Yes." + END)["input_ids"])
        return {_asked(chatml, r): r.seed for r in engine.seen}

    first, second = seeds(["one", "two", "three"]), seeds(["three", "four", "one"])
    assert first["one"] == second["one"] and first["three"] == second["three"]
    assert len({*first.values(), *second.values()}) == 4
    assert all(0 <= s < 2**63 for s in first.values())
    one = parse_conversation(chat("one", "x"), 1).messages[:1]
    assert prompt_seed(0, one) != prompt_seed(1, one)


def test_the_target_is_asked_as_it_will_be_served(tmp_path, chatml) -> None:
    path = write_lines(
        tmp_path / "ask.jsonl",
        [{"prompt": "plain"}, {"messages": chat("own", "x", "again", system="Mine.")["messages"]}],
    )
    target = TargetConfig(path="tiny", system_prompt="Be brief.")
    rows, (engine,) = _regenerate(path, chatml, lambda _: chatml("Yes." + END)["input_ids"], target, max_context=64)
    assert [m["content"] for m in json.loads(rows[0]["messages"])] == ["Be brief.", "plain", "Yes."]
    assert [m["content"] for m in json.loads(rows[1]["messages"])] == ["Mine.", "own", "x", "again", "Yes."]
    for request, row in zip(engine.seen, rows, strict=True):
        assert (request.temperature, request.top_k, request.top_p) == (1.0, 0, 1.0)
        assert request.max_new_tokens == min(24, 64 - len(request.prompt_ids))
        assert request.stop_ids == (0, 2)
        assert chatml.decode(request.prompt_ids).endswith("<|im_start|>assistant\n")
        assert row["prompt_tokens"] == len(request.prompt_ids)


def test_answers_with_less_room_than_asked_for_are_counted(tmp_path, chatml) -> None:
    long = "word " * 30
    path = write_lines(tmp_path / "ask.jsonl", [{"prompt": p} for p in ("Hi", long + "cut", long + "short")])
    lengths = [len(ChatFormat(chatml).prompt_ids(parse_conversation(chat(long + w, "x"), 1).messages[:1]))
               for w in ("cut", "short")]  # fmt: skip

    def say(request: Request) -> list[int]:
        return chatml("Yes." + END if "short" in _asked(chatml, request) else "Yes, yes, yes. " * 30)["input_ids"]

    rows, _ = _regenerate(path, chatml, say, max_context=max(lengths) + SETTINGS.max_new_tokens - 4)
    assert [r["clipped"] for r in rows] == [0, 1, 1]
    assert [r["finish_reason"] for r in rows] == ["length", "length", "stop"]
    counts, _ = write_answers(tmp_path, rows)
    assert (counts["clipped"], counts["clipped_cut"]) == (2, 1)


def test_an_answer_that_the_pool_cut_is_kept_and_asked_for_again_until_there_are_pages(tmp_path, chatml) -> None:
    long = "word " * 10
    path = write_lines(tmp_path / "ask.jsonl", [{"prompt": p} for p in ("Hi", long + "cut", long + "short", long)])
    own = ChatFormat(chatml)
    longest = max(len(own.prompt_ids([Message("user", p)])) for p in (long + "cut", long + "short"))

    def say(request: Request) -> list[int]:
        if _asked(chatml, request).endswith(" "):
            return own.tokenizer(" " * 40)["input_ids"]  # nothing yet when it is cut
        return chatml("Yes." + END if "short" in _asked(chatml, request) else "Yes, yes, yes. " * 30)["input_ids"]

    def asked(**limits: int) -> list[tuple[Any, ...]]:
        rows, _ = _regenerate(path, chatml, say, **limits)
        assert all(r["response_tokens"] == 24 for r in rows if r["finish_reason"] == "length" and not r["clipped"])
        return [(r["clipped"], r["finish_reason"], r["error"], r["retry"]) for r in rows]

    empty = "the target's response is empty"
    short = longest + SETTINGS.max_new_tokens - 12
    assert asked(pool=short) == [(0, "length", "", 0), (1, "length", "", 1), (1, "stop", "", 0), (1, "", empty, 1)]
    assert asked() == [(0, "length", "", 0), (0, "length", "", 0), (0, "stop", "", 0), (0, "", empty, 0)]
    # Where max_context leaves no more than the pool does, no memory helps.
    assert [r[3] for r in asked(pool=short, max_context=short)] == [0, 0, 0, 0]
    assert [r[3] for r in asked(pool=short, max_context=short + 1)] == [0, 1, 0, 1]


def test_prompt_and_answer_have_the_room_that_the_engine_says(tmp_path) -> None:
    """Four pages of 16 tokens, where engine.max_context is 512."""
    target = load_target(TARGET, tmp_path)
    made: list[Engine] = []

    def asked(pages: int) -> list[dict[str, Any]]:
        def load() -> tuple[Any, Engine]:
            made.append(engine_of(target, make_proposer("none"), pages=pages))
            return target.tokenizer, made[-1]

        return list(rows_of(Regenerator(TARGET, EngineConfig(), SETTINGS, tmp_path, load=load)(rows)))

    prompts = ["Hi", "word " * 10, "word " * 40, "word " * 400]
    rows = {
        "row": np.arange(4),
        "messages": np.array([json.dumps([{"role": "user", "content": p}]) for p in prompts], dtype=object),
        "source": np.array([""] * 4, dtype=object),
    }
    answered = asked(pages=4)
    lengths = [len(ChatFormat(target.tokenizer).prompt_ids([Message("user", p)])) for p in prompts]
    assert lengths[0] + 24 < 64 < lengths[1] + 24 and lengths[1] < 64 < lengths[2] < 512 < lengths[3]
    assert [r["error"] == "" for r in answered] == [True, True, False, False]
    assert [r["clipped"] for r in answered] == [0, 1, 0, 0]
    assert (answered[1]["response_tokens"], answered[1]["finish_reason"]) == (64 - lengths[1], "length")
    assert "no room for an answer in the 64 tokens that the KV pool holds: raise engine.kv_gib" in answered[2]["error"]
    assert "no room for an answer in engine.max_context=512" in answered[3]["error"]
    assert [r["retry"] for r in answered] == [0, 1, 1, 0], "with more memory these two fit"
    roomy = asked(pages=30)
    assert [r["error"] == "" for r in roomy] == [True, True, True, False]
    assert [(r["clipped"], r["retry"]) for r in roomy] == [(0, 0)] * 4 and roomy[0] == answered[0]
    cut, whole = (json.loads(r[1]["messages"])[-1]["content"] for r in (answered, roomy))
    assert whole.startswith(cut) and roomy[1]["response_tokens"] > answered[1]["response_tokens"]
    assert len(made) == 2, "no engine failed"


def test_an_answer_that_the_engine_gave_up_may_be_asked_for_again(tmp_path, chatml, monkeypatch) -> None:
    def generate(self: ScriptedEngine, requests: list[Request]) -> list[Completion]:
        return [Completion(r.id, [], "error", RequestMetrics(), error="the pages ran out") for r in requests]

    monkeypatch.setattr(ScriptedEngine, "generate", generate)
    path = write_lines(tmp_path / "ask.jsonl", [{"prompt": "Hi"}])
    (row,), _ = _regenerate(path, chatml, lambda _: [])
    assert (row["error"], row["retry"]) == ("the pages ran out", 1)
