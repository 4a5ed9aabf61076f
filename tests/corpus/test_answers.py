"""What the target answered is an artifact, and a corpus knows from it whose answers it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifact
from pipeline.config import CorpusConfig
from pipeline.corpus.answers import CONVERSATIONS, KIND, read_answers, read_provenance, write_answers
from pipeline.corpus.build import build_corpus, read_rows
from pipeline.corpus.conversations import read_conversations
from pipeline.errors import ArtifactError, DraftlineError
from tests.corpus.chats import chat

END = "<|im_end|>"
DEMO = Path(__file__).resolve().parents[2] / "pipeline" / "corpus" / "demo"


def _rows(n: int, failed: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [
        {
            "row": i,
            "messages": json.dumps(chat(f"What is {i}?", f"It is {i}, I say.")["messages"]),
            "source": "ask",
            "finish_reason": "" if i in failed else "stop",
            "error": "it broke\u2028" if i in failed else "",
            "retry": int(i in failed),
            "prompt_tokens": 10,
            "response_tokens": 7,
            "clipped": 0,
        }
        for i in range(1, n + 1)
    ]


def _made(out: Path, rows: Any, by: dict[str, str] | None = None) -> artifact.Manifest:
    with artifact.create(out, KIND, config={}, inputs={}, target=by) as staging:
        counts, info = write_answers(staging.path, rows)
        staging.counts |= counts
        staging.info |= info
    return artifact.load(out, KIND)


def test_the_artifact_is_the_same_in_whatever_order_answers_came_and_says_what_it_is(tmp_path) -> None:
    manifest = _made(tmp_path / "a", _rows(40, failed=(3,)), {"id": "tiny"})
    again = _made(tmp_path / "b", reversed(_rows(40, failed=(3,))), {"id": "tiny"})
    assert manifest.digest == again.digest
    assert manifest.counts == {
        "rows": 39, "failed": 1, "retry": 1, "clipped": 0, "clipped_cut": 0, "pool_cut": 0,
        "prompt_tokens": 390, "response_tokens": 273,
    }  # fmt: skip
    assert manifest.info["failed"] == [{"row": 3, "error": "it broke\u2028"}]
    assert manifest.info["finish_reasons"] == {"stop": 39}
    talks = list(read_conversations(tmp_path / "a" / CONVERSATIONS, []))
    assert len(talks) == 39
    assert talks[2].messages[1].content == "It is 4, I say." and talks[2].source == "ask"


def test_answers_are_read_as_they_were_written(tmp_path) -> None:
    rows = _rows(5, failed=(2,))
    cut = json.loads(rows[4]["messages"])
    cut[-1] |= {"finish_reason": "length", "token_ids": [7, 8]}
    rows[4] |= {"messages": json.dumps(cut, ensure_ascii=False), "finish_reason": "length"}
    write_answers(tmp_path, rows)
    back = read_answers(tmp_path)
    assert back[1] == {**rows[1], "messages": "", "source": ""}
    for row, read in zip([rows[0], *rows[2:]], [back[0], *back[2:]], strict=True):
        assert {**read, "messages": json.loads(read["messages"])} == {**row, "messages": json.loads(row["messages"])}
    (tmp_path / "answers.jsonl").unlink()
    assert read_answers(tmp_path) == [], "the other file alone may be half of one"


def test_a_regenerated_file_becomes_a_corpus_and_an_altered_one_does_not(tmp_path, chatml) -> None:
    path = tmp_path / "own" / CONVERSATIONS
    _made(path.parent, _rows(60), {"id": "tiny"})
    config = CorpusConfig(source=str(path), heldout_fraction=0.2, min_loss_tokens=2)
    manifest = build_corpus(config, chatml, None, tmp_path / "corpus")
    assert manifest.info["regenerated_by"] == {"id": "tiny"}
    rows = read_rows(tmp_path / "corpus", "train")
    assert chatml.decode(rows[0].input_ids[rows[0].loss_mask]).endswith("I say." + END)
    (path.parent / "answers.jsonl").unlink()
    assert read_provenance(path) is not None, "a copy of the conversations and their manifest is enough"
    _made(tmp_path / "other", _rows(59))
    path.write_bytes((tmp_path / "other" / CONVERSATIONS).read_bytes())
    with pytest.raises(ArtifactError, match=f"{CONVERSATIONS} was altered"):
        build_corpus(config, chatml, None, tmp_path / "corpus")


def test_a_corpus_knows_whether_its_own_target_wrote_its_answers(tmp_path, chatml) -> None:
    ours = {"id": "tiny", "weight_digest": "w" * 64, "tokenizer_digest": "t" * 64}
    own = tmp_path / "own"
    config = CorpusConfig(source=str(own / CONVERSATIONS), heldout_fraction=0.2, min_loss_tokens=2)
    cases = [
        (ours, []),
        ({**ours, "id": "moved/tiny", "revision": "main"}, []),
        ({**ours, "weight_digest": "v" * 64}, ["weights"]),
        ({**ours, "weight_digest": "v" * 64, "tokenizer_digest": "s" * 64}, ["weights", "tokenizer"]),
        (None, []),
    ]
    for by, differs in cases:
        _made(own, _rows(60), by)
        manifest = build_corpus(config, chatml, ours, tmp_path / "corpus")
        shutil.rmtree(tmp_path / "corpus")
        assert manifest.info["foreign"] == differs
        assert manifest.info["regenerated_by"] == by


def test_somebody_elses_manifest_says_nothing_of_a_file(tmp_path) -> None:
    path = tmp_path / "own.jsonl.zst"
    path.write_bytes(b"x")
    assert read_provenance(path) is None
    for content in ("", "[]", '{"file": "own.jsonl.zst"}'):
        (tmp_path / "manifest.json").write_text(content)
        assert read_provenance(path) is None
    with artifact.create(tmp_path / "report", "report", config={}) as staging:
        (staging.path / "own.jsonl.zst").write_bytes(b"x")
    assert read_provenance(tmp_path / "report" / "own.jsonl.zst") is None


def test_the_shipped_conversations_are_such_an_artifact() -> None:
    manifest = artifact.load(DEMO, KIND)
    assert manifest == read_provenance(DEMO / "demo.jsonl.zst")
    assert (manifest.target or {})["id"] == "smollm2-135m"
    assert manifest.inputs == {"prompts": artifact.sha256_file(DEMO / "prompts.jsonl")}


def test_no_answer_at_all_is_an_error_with_the_reason(tmp_path) -> None:
    with pytest.raises(DraftlineError, match="No prompt was answered.*2 failed; the first, row 1: it broke"):
        write_answers(tmp_path, _rows(2, failed=(1, 2)))
    assert not list(tmp_path.iterdir())
