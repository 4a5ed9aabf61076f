"""A champion that has answered is not asked again, and its answer is on a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import serve
from pipeline.config import PipelineConfig
from pipeline.entry import compose, recorder


def test_an_answer_that_no_finished_run_tells_of_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @contextlib.contextmanager
    def served(_: PipelineConfig) -> Iterator[tuple[str, str]]:
        yield "http://nowhere", "1"

    def ask(url: str, question: str, max_tokens: int) -> dict[str, object]:
        asked.append(question)
        return {"model": "m", "answer": "Yes.", "draftline": {"tau": 1.5}}

    best = SimpleNamespace(name="m", version="1", manifest=SimpleNamespace(digest="d" * 64))
    monkeypatch.setattr("pipeline.registry.versions.champion", lambda *_: best)
    monkeypatch.setattr(serve, "served", served)
    monkeypatch.setattr(serve, "ask", ask)
    config = compose(["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"])
    answer = serve.stage(config)
    kept = recorder(config)
    find = lambda: kept.client.search_runs([kept.experiment_id], "tags.`draftline.stage` = 'serve'")  # noqa: E731
    assert serve.stage(config) == answer
    (first,) = find()
    assert first.data.tags["artifact_digest"] == answer["key"] and "seconds" in first.data.metrics
    kept.client.delete_run(first.info.run_id)
    assert serve.stage(config) == answer
    (again,) = find()
    assert again.data.tags["artifact_digest"] == answer["key"]
    assert again.data.metrics == {"tau": 1.5} and len(asked) == 1
