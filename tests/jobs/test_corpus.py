"""The jobs that make a corpus say what is odd about it, and record it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import corpus, regenerate
from pipeline.artifact import Manifest
from pipeline.entry import compose, recorder, run


def settings(place: Path, *more: str) -> list[str]:
    return ["experiment=smoke", f"output_root={place}", f"cache_dir={place}/cache", *more]


def test_answers_of_another_target_are_told_each_time_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped conversations are SmolLM2's; the smoke experiment's target is another."""
    config = compose(settings(tmp_path))
    for _ in range(2):
        manifest = corpus.stage(config)
        said = capsys.readouterr().out
        assert "WARNING: the answers of pipeline/corpus/demo/demo.jsonl.zst were written by smollm2-135m" in said
        assert "weights and tokenizer differ from those of the target tiny" in said
    assert manifest.info["foreign"] == ["weights", "tokenizer"]
    kept = recorder(config)
    (found,) = kept.client.search_runs([kept.experiment_id], "tags.`draftline.stage` = 'corpus'")
    assert found.data.tags["answers.target"] == "smollm2-135m"
    assert found.data.tags["answers.differ_from_target"] == "weights, tokenizer"


def test_answers_that_fit_beside_no_prompt_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = settings(tmp_path, "corpus.regenerate.max_new_tokens=512", "engine.max_context=512")
    assert run(regenerate.stage, "regenerate", overrides, ray=False) == 2
    said = capsys.readouterr().err
    assert "corpus.regenerate.max_new_tokens=512 leaves no prompt any room in engine.max_context=512" in said


def test_prompts_that_clip_their_answers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"sampling": {"max_new_tokens": 16}, "max_context": 512, "prompts": 10}
    counts = {"rows": 10, "clipped": 3, "clipped_cut": 2, "pool_cut": 1, "failed": 0}
    regenerate.warn(Manifest("conversations", {}, counts, asked, {}))
    said = capsys.readouterr().out
    assert "WARNING: 3 of 10 prompts left their answers less room than corpus.regenerate.max_new_tokens=16" in said
    assert "2 answers were cut by it. The KV pool cut 1 of these, and the next run asks them again" in said
    assert "engine.max_context cut 1: raise it" in said and "no answer" not in said
    del counts["pool_cut"]  # of an artifact from before it was counted: nobody knows what cut them
    regenerate.warn(Manifest("conversations", {}, counts, asked, {}))
    said = capsys.readouterr().out
    assert "2 answers were cut by it." in said and "KV pool cut" not in said and "engine.max_context cut" not in said
