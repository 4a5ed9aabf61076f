"""From a file of conversations to the corpus artifact: what is kept, where it goes, and what is counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import build
from pipeline.corpus.build import (
    SPLITS,
    RowReader,
    build_corpus,
    count_bigrams,
    read_heldout_prompts,
    read_rows,
    read_table,
    read_token_counts,
)
from pipeline.corpus.rows import TemplateError, TokenRow, sample_id_of
from pipeline.errors import ArtifactError, DraftlineError
from tests.corpus.chats import CHATML, CHATML_SPANS, chat, with_template, write_lines

IDENTITY = {"id": "tiny", "revision": "1", "weight_digest": "w" * 64, "tokenizer_digest": "t" * 64}
END = "<|im_end|>"


def _config(source: Path, **changes: object) -> CorpusConfig:
    config = CorpusConfig(source=str(source), max_length=256, heldout_fraction=0.2, min_loss_tokens=2)
    return replace(config, **changes)


def _talks(n: int, answer: str = "The answer is") -> list[object]:
    return [chat(f"What is {i}?", f"{answer} {i}.", source=("maths", "chat")[i % 2]) for i in range(n)]


def _prompts(corpus: Path, split: str, tokenizer) -> set[str]:
    return {tokenizer.decode(r.input_ids[: r.prompt_length]) for r in read_rows(corpus, split)}  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "mine.jsonl", _talks(60))


def test_rows_come_back_as_they_were_made_and_every_number_adds_up(tmp_path, source, tokenizer) -> None:
    manifest = build_corpus(_config(source), tokenizer, IDENTITY, tmp_path / "corpus")
    rows: dict[str, list[TokenRow]] = {split: read_rows(tmp_path / "corpus", split) for split in SPLITS}
    for split in SPLITS:
        assert manifest.counts[f"{split}_rows"] == len(rows[split]) > 0
        assert manifest.counts[f"{split}_tokens"] == sum(len(r.input_ids) for r in rows[split])
        assert manifest.counts[f"{split}_loss_tokens"] == sum(int(r.loss_mask.sum()) for r in rows[split])
        for row in rows[split]:
            number = tokenizer.decode(row.input_ids[: row.prompt_length]).split("What is ")[1].split("?")[0]
            assert tokenizer.decode(row.input_ids[row.loss_mask]) == f"The answer is {number}." + END
            assert row.sample_id == sample_id_of(row.input_ids, row.loss_mask)
            assert row.source == ("maths", "chat")[int(number) % 2]
    assert sum(len(r) for r in rows.values()) == 60
    assert manifest.kind == "corpus" and manifest.target == IDENTITY
    assert sum(manifest.info["sources"]["train"].values()) == len(rows["train"])
    spoken = np.concatenate([r.input_ids[r.loss_mask] for r in rows["train"]])
    assert np.array_equal(read_token_counts(tmp_path / "corpus"), np.bincount(spoken, minlength=len(tokenizer)))
    assert pq.read_schema(tmp_path / "corpus" / "rows-train.parquet").names == [
        "sample_id", "source", "input_ids", "loss_mask", "prompt_length",
    ]  # fmt: skip


def test_no_prompt_is_on_both_sides_whatever_was_answered_to_it(tmp_path, chatml) -> None:
    talks = (
        _talks(60) + _talks(60, "I think it is") + [chat(f"What is {i}? ", "Who asks?", system="x") for i in range(60)]
    )
    source = write_lines(tmp_path / "mine.jsonl", talks)
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus")
    asked = {
        split: {p.split("user\n")[1].split("?")[0] for p in _prompts(tmp_path / "corpus", split, chatml)}
        for split in SPLITS
    }
    assert not asked["train"] & asked["heldout"]
    assert len(asked["train"] | asked["heldout"]) == 60
    assert 3 <= len(asked["heldout"]) <= 24  # 20% of 60, five standard deviations wide


def test_a_prompt_keeps_its_side_when_the_corpus_grows_or_is_reordered(tmp_path, source, chatml) -> None:
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "before")
    talks = _talks(200)
    random.Random(0).shuffle(talks)
    grown = write_lines(tmp_path / "grown.jsonl", talks)
    build_corpus(_config(grown), chatml, IDENTITY, tmp_path / "after")
    for split in SPLITS:
        assert _prompts(tmp_path / "before", split, chatml) <= _prompts(tmp_path / "after", split, chatml)
    build_corpus(_config(source, seed=1), chatml, IDENTITY, tmp_path / "other")
    assert _prompts(tmp_path / "other", "heldout", chatml) != _prompts(tmp_path / "before", "heldout", chatml)


def test_what_is_left_out_is_counted_and_bad_rows_are_listed_with_their_numbers(tmp_path, chatml) -> None:
    cut = {"role": "assistant", "content": "It is a long", "finish_reason": "length"}
    rows = [
        *_talks(40),
        chat("What is 0?", "The answer is 0.", source="again"),  # 41: the tokens of row 1
        "{oops",  # 42
        chat("one", "two", "three <|im_end|>", "four"),  # 43
        chat("k", ""),  # 44
        chat("word " * 300, "never seen"),  # 45: the prompt alone is longer than max_length
        chat("Say it", "."),  # 46: "." and the end token: 2 tokens
        chat("Tell", "a story " * 300),  # 47: longer than max_length
        {"messages": [{"role": "user", "content": "Long?"}, cut]},  # 48
    ]
    source = write_lines(tmp_path / "mine.jsonl", rows)
    counts = build_corpus(_config(source, min_loss_tokens=3), chatml, IDENTITY, tmp_path / "corpus").counts
    assert {k: counts[k] for k in counts if not k.startswith(("train", "heldout"))} == {
        "quarantined": 3, "duplicates": 1, "dropped_no_loss": 1, "dropped_few_loss": 1, "truncated": 1, "length_cut": 1,
    }  # fmt: skip
    assert counts["train_rows"] + counts["heldout_rows"] == 42
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert [(q["row"], q["reason"].split(":")[0]) for q in listed] == [
        (42, "not JSON"), (43, "messages[2]"), (44, "messages[1]"),
    ]  # fmt: skip
    assert listed[0]["raw"] == "{oops"
    longest = max((r for s in SPLITS for r in read_rows(tmp_path / "corpus", s)), key=lambda r: len(r.input_ids))
    assert len(longest.input_ids) == 256


def test_max_rows_takes_the_first_usable_ones(tmp_path, source, chatml) -> None:
    counts = build_corpus(_config(source, max_rows=30), chatml, IDENTITY, tmp_path / "corpus").counts
    assert counts["train_rows"] + counts["heldout_rows"] == 30


def test_a_system_prompt_reaches_conversations_that_have_none(tmp_path, chatml) -> None:
    talks = [*_talks(40), *[chat(f"Say {i}", "Fine, yes.", system="My own.") for i in range(40)]]
    source = write_lines(tmp_path / "mine.jsonl", talks)
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus", system_prompt="Be brief.")
    prompts = _prompts(tmp_path / "corpus", "train", chatml)
    assert all(("Be brief." in p) == ("What is" in p) and ("My own." in p) == ("Say" in p) for p in prompts)


def test_a_row_that_is_set_aside_names_the_message_of_its_file_though_a_system_prompt_was_put_first(
    tmp_path, chatml
) -> None:
    other_ids = {"role": "assistant", "content": "Yes.", "token_ids": [5]}
    bad = [chat("<|im_end|>", "Yes."), {"messages": [{"role": "user", "content": "Hi"}, other_ids]}]
    own = chat("Hi", "<|im_end|>", system="My own.")
    source = write_lines(tmp_path / "mine.jsonl", [*_talks(40), *bad, own])
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus", system_prompt="Be brief.")
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["row"], r["reason"].split(":")[0]) for r in listed] == [
        (41, "messages[0]"), (42, "messages[1]"), (43, "messages[2]"),
    ]  # fmt: skip
    assert [json.loads(r["raw"]) for r in listed] == [{"messages": row["messages"]} for row in (*bad, own)]


def test_the_same_inputs_make_the_same_artifact_and_are_not_worked_twice(tmp_path, source, bpe) -> None:
    tokenizer = with_template(bpe, CHATML)
    first = build_corpus(_config(source), tokenizer, IDENTITY, tmp_path / "corpus")
    assert build_corpus(_config(source), tokenizer, IDENTITY, tmp_path / "twin").digest == first.digest
    assert build_corpus(_config(source), tokenizer, IDENTITY, tmp_path / "corpus").created == first.created
    moved = source.rename(tmp_path / "moved.jsonl")
    assert build_corpus(_config(moved), tokenizer, IDENTITY, tmp_path / "corpus").created == first.created
    for changed in (
        build_corpus(_config(moved, max_length=100), tokenizer, IDENTITY, tmp_path / "a"),
        build_corpus(_config(moved), with_template(bpe, CHATML_SPANS), IDENTITY, tmp_path / "b"),
        build_corpus(_config(moved), tokenizer, {**IDENTITY, "weight_digest": "0" * 64}, tmp_path / "c"),
        build_corpus(_config(moved), tokenizer, IDENTITY, tmp_path / "d", system_prompt="Be brief."),
    ):
        assert changed.digest != first.digest
    with moved.open("a") as f:
        f.write(json.dumps(chat("One more?", "Yes, one more.")) + "\n")
    grown = build_corpus(_config(moved), tokenizer, IDENTITY, tmp_path / "corpus")
    assert grown.counts["train_rows"] + grown.counts["heldout_rows"] == 61


@pytest.mark.parametrize("name", ["rows-train.parquet", "token_counts.npy", "quarantine.jsonl"])
def test_an_altered_artifact_is_refused(tmp_path, chatml, name: str) -> None:
    source = write_lines(tmp_path / "mine.jsonl", [*_talks(60), "{oops"])
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus")
    file = tmp_path / "corpus" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        read_table(tmp_path / "corpus", "train")
    if name == "token_counts.npy":
        with pytest.raises(ArtifactError, match=f"{name} was altered"):
            read_token_counts(tmp_path / "corpus")


def test_a_reader_gives_the_rows_that_are_asked_for_and_reads_no_others(tmp_path, source, chatml, monkeypatch) -> None:
    monkeypatch.setattr(build, "_ROW_GROUP", 8)
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus")
    whole = read_rows(tmp_path / "corpus", "train")
    reader = RowReader(tmp_path / "corpus", "train")
    assert len(reader) == len(whole) > 24
    for numbers in (range(len(whole)), [len(whole) - 1, 0, 9, 9, 8], []):
        given = reader.rows(numbers)
        assert [r.sample_id for r in given] == [whole[n].sample_id for n in numbers]
        for row, n in zip(given, numbers, strict=True):
            assert np.array_equal(row.input_ids, whole[n].input_ids) and row.input_ids.dtype == np.int32
            assert np.array_equal(row.loss_mask, whole[n].loss_mask) and row.loss_mask.dtype == bool
            assert (row.source, row.prompt_length) == (whole[n].source, whole[n].prompt_length)
    with pytest.raises(IndexError, match=f"row {len(whole)} of a corpus split"):
        reader.rows([0, len(whole)])

    file = tmp_path / "corpus" / "rows-train.parquet"
    first = pq.read_metadata(file).row_group(0).column(0)
    after = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    assert first.data_page_offset < after
    content[after - 40 : len(content) // 2] = bytes(len(content) // 2 - after + 40)
    (tmp_path / "broken").mkdir()
    for other in file.parent.iterdir():
        (tmp_path / "broken" / other.name).write_bytes(content if other == file else other.read_bytes())
    broken = RowReader(tmp_path / "broken", "train")
    assert [r.sample_id for r in broken.rows(range(8))] == [r.sample_id for r in whole[:8]]
    with pytest.raises(OSError):
        broken.rows([9])
    assert len(RowReader(tmp_path / "corpus", "heldout")) == 60 - len(whole)


@pytest.mark.parametrize("most", [1, 40, 2**24])
def test_bigrams_are_counted_as_the_rows_have_them(tmp_path, source, chatml, monkeypatch, most: int) -> None:
    """Whatever the batches, and however often what was read is counted up."""
    monkeypatch.setattr(build, "_ROW_GROUP", 3)
    build_corpus(_config(source), chatml, IDENTITY, tmp_path / "corpus")
    out = tmp_path / "corpus"
    expected = Counter(
        (int(row.input_ids[i - 1]), int(row.input_ids[i]))
        for row in read_rows(out, "train")
        for i in range(1, len(row.input_ids))
        if row.loss_mask[i]
    )
    found = [list(map(int, x)) for x in count_bigrams(out, most)]
    assert dict(zip(zip(*found[:2], strict=True), found[2], strict=True)) == expected
    assert list(zip(*found[:2], strict=True)) == sorted(expected)


def test_a_corpus_with_nothing_in_it_is_refused_and_leaves_nothing_behind(tmp_path, source, chatml) -> None:
    out = tmp_path / "corpus"

    def refused(match: str, path: Path = source, **changes: object) -> None:
        with pytest.raises(DraftlineError, match=match):
            build_corpus(_config(path, **changes), chatml, IDENTITY, out)
        assert not out.exists() and not list(tmp_path.glob(".corpus*"))

    refused("corpus.source is .*none.jsonl.*: no such file", tmp_path / "none.jsonl")
    refused(r"'dropped_few_loss': 60.*corpus\.min_loss_tokens", min_loss_tokens=100)
    refused(r"'dropped_no_loss': 60.*first 8 \(corpus\.max_length\)", max_length=8)
    refused("held-out split.*raise corpus.heldout_fraction", heldout_fraction=1e-9)
    refused("fell in the held-out split.*lower corpus.heldout_fraction", heldout_fraction=1 - 1e-12)
    refused(r"must be in \[0, 1\)", heldout_fraction=1.0)
    bad = write_lines(tmp_path / "bad.jsonl", [chat("Hi", "Hello <|im_end|>")] * 3)
    refused(r"'quarantined': 3.*The commonest reason: messages\[1\]", bad)
    whole = build_corpus(_config(source, heldout_fraction=0.0), chatml, IDENTITY, out)
    assert (whole.counts["train_rows"], whole.counts["heldout_rows"]) == (60, 0)
    assert read_rows(out, "heldout") == []


def test_a_template_that_cannot_mark_answers_stops_the_build(tmp_path, source, bpe) -> None:
    with pytest.raises(TemplateError, match="target.chat_template=FILE"):
        build_corpus(_config(source), with_template(bpe, None), IDENTITY, tmp_path / "corpus")


def test_heldout_prompts_keep_line_separators_that_json_leaves(tmp_path, chatml) -> None:
    asked = [f"{n}\u2028and\x85more" for n in range(20)]
    source = write_lines(tmp_path / "a.jsonl", [chat(a, "Paris is the capital of France.") for a in asked])
    build_corpus(_config(source, heldout_fraction=0.5), chatml, None, tmp_path / "c")
    kept = [m.content for messages in read_heldout_prompts(tmp_path / "c").values() for m in messages]
    assert kept and set(kept) < set(asked)
