"""What a user's file of conversations may hold, and what becomes of rows that are wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from pipeline.corpus.conversations import Quarantined, read_conversations, read_prompts
from pipeline.errors import DraftlineError
from tests.corpus.chats import chat, write_lines

GOOD = chat("Hi", "Hello!")


def _read(path: Path) -> tuple[list[str], list[Quarantined]]:
    quarantine: list[Quarantined] = []
    return [c.messages[-1].content for c in read_conversations(path, quarantine)], quarantine


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a list, not a JSON object"),
        ({"conversations": []}, "messages is missing (keys: ['conversations'])"),
        ({"messages": "hello"}, "messages is a string, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "messages[0] is a string, not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: unknown role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "user content is a list, not a string"),
        ({"messages": [{"role": "user", "content": None}]}, "user content is null, not a string"),
        (chat("Hi", "  \n"), "messages[1]: assistant content is empty"),
        (chat("", "Hello"), "messages[0]: user content is empty"),
        ({"messages": [GOOD["messages"][0]] * 2 + [GOOD["messages"][1]]}, "messages[1]: two user turns in a row"),
        ({"messages": [*GOOD["messages"], GOOD["messages"][1]]}, "messages[2]: two assistant turns in a row"),
        ({"messages": GOOD["messages"][1:]}, "messages[0]: the first turn is the assistant's"),
        ({"messages": [*GOOD["messages"], {"role": "system", "content": "s"}]}, "messages[2] is a system message"),
        ({"messages": [{"role": "system", "content": "s"}]}, "only a system message"),
        (chat("Hi"), "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
        ({**GOOD, "source": 3}, "source is a number, not a string"),
        (
            {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "token_ids": [1, "2"]}]},
            "token_ids is not a list",
        ),
        ({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "finish_reason": 1}]}, "finish_reason is a number"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_number_and_reason_and_the_rest_goes_on(
    tmp_path: Path, bad: object, reason: str
) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [GOOD, "", bad, chat("And?", "Last.")])
    answers, quarantine = _read(path)
    assert answers == ["Hello!", "Last."]
    assert [q.row for q in quarantine] == [3]
    assert reason in quarantine[0].reason
    assert quarantine[0].raw == path.read_text().splitlines()[2]


def test_bytes_that_are_not_utf8_spoil_only_their_row(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe{}\n" + json.dumps(GOOD).encode())
    answers, quarantine = _read(path)
    assert answers == ["Hello!", "Hello!"]
    assert (quarantine[0].row, quarantine[0].reason) == (2, "not UTF-8 (byte 0)")


def test_a_conversation_keeps_its_row_number_source_and_exact_text(tmp_path: Path) -> None:
    text = "  café \u2028 – 日本\r\n\ttabs "
    path = write_lines(tmp_path / "mine.jsonl", ["", chat("q", text, source="wiki"), chat("q", "a")])
    conversations = list(read_conversations(path, []))
    assert [(c.row, c.source) for c in conversations] == [(2, "wiki"), (3, "mine")]
    assert conversations[0].messages[1].content == text


def _zst(data: bytes) -> bytes:
    half = data.index(b"\n") + 7  # two frames, divided within a line, as `cat a.zst b.zst` would
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", _zst)])
def test_compressed_files_read_the_same_and_a_truncated_one_is_refused(tmp_path: Path, suffix: str, pack) -> None:
    plain = write_lines(tmp_path / "mine.jsonl", [chat(f"question {i}", f"answer {i} " + "x" * i) for i in range(50)])
    packed = tmp_path / f"mine.jsonl{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert _read(packed) == _read(plain)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DraftlineError, match="truncated or damaged"):
        _read(packed)


def test_files_with_nothing_to_use_are_refused_and_say_why(tmp_path: Path) -> None:
    with pytest.raises(DraftlineError, match="No such file"):
        _read(tmp_path / "none.jsonl")
    with pytest.raises(DraftlineError, match="must end with .jsonl"):
        _read(write_lines(tmp_path / "mine.txt", [GOOD]))
    with pytest.raises(DraftlineError, match="is empty"):
        _read(write_lines(tmp_path / "empty.jsonl", ["", "  "]))
    with pytest.raises(DraftlineError, match=r"Every row .* \(3 of 3\); 2 because: no assistant turn"):
        _read(write_lines(tmp_path / "bad.jsonl", [chat("Hi"), "{", chat("Ho")]))


def test_prompts_come_as_prompt_as_turns_or_as_messages(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "ask.jsonl",
        [
            {"prompt": "one", "category": "maths"},
            {"turns": ["two", "never asked"]},
            chat("three", "asked", "again?", system="Be kind."),
            chat("four", "answered before by another model"),
            {"turns": []},
            {"question": "?"},
        ],
    )
    quarantine: list[Quarantined] = []
    prompts = list(read_prompts(path, quarantine))
    assert [p.messages[-1].content for p in prompts] == ["one", "two", "again?", "four"]
    assert all(p.messages[-1].role == "user" for p in prompts)
    assert prompts[2].messages[0].content == "Be kind."
    assert [p.source for p in prompts] == ["maths", "ask", "ask", "ask"]
    assert [q.row for q in quarantine] == [5, 6]
    assert [p.row for p in read_prompts(path, [], limit=2)] == [1, 2]
