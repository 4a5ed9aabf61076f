"""The regenerating stage keeps what was answered, asks again what the engine failed at, and says a user's mistake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import regenerate as job
from pipeline import artifact
from pipeline.config import PipelineConfig, RegenerateConfig
from pipeline.corpus import regenerate as stage
from pipeline.corpus.answers import CONVERSATIONS, KIND
from pipeline.corpus.conversations import read_conversations
from pipeline.entry import compose, recorder, run
from pipeline.errors import ConfigError, DraftlineError
from tests.corpus.chats import write_lines

pytestmark = pytest.mark.usefixtures("migrated")


class Asker:
    """Stands where Ray's actors do: answers in chunks of two, fails at `bad`, and dies when it reaches `fatal`.

    The answer to prompt n is n times as long as that to the first; the pool has room for `pool` times as much.
    """

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.bad: set[int] = set()
        self.refused: set[int] = set()
        self.fatal = 0
        self.pool = 100

    def __call__(self, rows: list[dict[str, Any]], config: Any, target: Any, folder: Path) -> None:
        self.asked.append([r["row"] for r in rows])
        first = 1 + max((int(f.stem) for f in folder.glob("*.json")), default=-1)
        for n, i in enumerate(range(0, len(rows), 2)):
            if any(r["row"] == self.fatal for r in rows[i : i + 2]):
                raise DraftlineError("it died")
            artifact.write_json(folder / f"{first + n:08d}.json", [self._answer(r) for r in rows[i : i + 2]])

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        n = row["row"]
        error = "CUDA error" if n in self.bad else "too long" if n in self.refused else ""
        cut = not error and n > self.pool
        length, reason = min(n, self.pool), "" if error else "length" if cut else "stop"
        answer = {"role": "assistant", "content": f"It is {n}." if not cut else f"It is {n}"[:length]}
        said = [] if error else [answer | {"finish_reason": reason} if cut else answer]
        numbers = {"prompt_tokens": 5, "response_tokens": 0 if error else length, "clipped": int(cut)}
        messages = json.dumps(json.loads(row["messages"]) + said)
        retry = int(cut or n in self.bad)
        return {**row, "messages": messages, "finish_reason": reason, "error": error, "retry": retry, **numbers}


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Asker:
    made = Asker()
    monkeypatch.setattr(stage, "_ask", made)
    return made


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    prompts = write_lines(tmp_path / "ask.jsonl", [{"prompt": f"What is {n}?"} for n in range(1, 7)])
    return compose(settings(tmp_path, f"corpus.regenerate.prompts={prompts}", "corpus.regenerate.limit=0"))


def settings(place: Path, *more: str) -> list[str]:
    return ["experiment=smoke", f"output_root={place}/out", f"cache_dir={place}/cache", *more]


def said(out: Path) -> list[str]:
    return [c.messages[1].content for c in read_conversations(out / CONVERSATIONS, [])]


def test_what_is_done_is_done_once(config, asker, tmp_path) -> None:
    begun: list[int] = []
    manifest = stage.regenerate(config, tmp_path / "r", lambda: begun.append(1))
    again = stage.regenerate(config, tmp_path / "r", lambda: begun.append(2))
    assert again == manifest == artifact.load(tmp_path / "r", KIND)
    assert asker.asked == [[1, 2, 3, 4, 5, 6]] and begun == [1]
    assert set(manifest.files) == {CONVERSATIONS, "answers.jsonl"}
    assert said(tmp_path / "r") == [f"It is {n}." for n in range(1, 7)]


def test_prompts_that_the_engine_failed_at_are_asked_again_and_those_that_cannot_be_answered_are_not(
    config, asker, tmp_path, capsys
) -> None:
    asker.bad, asker.refused = {2, 5}, {3}
    manifest = stage.regenerate(config, tmp_path / "r")
    assert (manifest.counts["rows"], manifest.counts["failed"], manifest.counts["retry"]) == (3, 3, 2)
    job.warn(manifest)
    assert "3 of 6 prompts have no answer (the first, row 2: CUDA error). The engine failed at 2," in (
        capsys.readouterr().out
    )
    asker.bad = {5}
    stage.regenerate(config, tmp_path / "r")
    asker.bad = set()
    manifest = stage.regenerate(config, tmp_path / "r")
    stage.regenerate(config, tmp_path / "r")
    assert asker.asked == [[1, 2, 3, 4, 5, 6], [2, 5], [5]], "each once a run, and nothing that was answered"
    assert (manifest.counts["failed"], manifest.counts["retry"]) == (1, 0)
    assert said(tmp_path / "r") == ["It is 1.", "It is 2.", "It is 4.", "It is 5.", "It is 6."]


def test_answers_that_the_pool_cut_are_kept_until_a_run_has_them_whole(config, asker, tmp_path, capsys) -> None:
    asker.pool, asker.refused = 4, {1}
    manifest = stage.regenerate(config, tmp_path / "r")
    whole = ["It is 2.", "It is 3.", "It is 4."]
    assert said(tmp_path / "r") == [*whole, "It i", "It i"]
    assert manifest.info["finish_reasons"] == {"length": 2, "stop": 3}
    assert {name: manifest.counts[name] for name in ("rows", "failed", "retry", "clipped_cut", "pool_cut")} == {
        "rows": 5, "failed": 1, "retry": 2, "clipped_cut": 2, "pool_cut": 2,
    }  # fmt: skip
    job.warn(manifest)
    told = capsys.readouterr().out
    assert "The KV pool cut 2 of these, and the next run asks them again: raise engine.kv_gib" in told
    assert "engine.max_context cut" not in told and "The engine failed" not in told
    # Small again, smaller, and with an engine that fails: only these are asked, and what is there stays.
    assert stage.regenerate(config, tmp_path / "r").digest == manifest.digest
    asker.pool = 3
    assert stage.regenerate(config, tmp_path / "r").digest == manifest.digest
    asker.bad = {5, 6}
    assert stage.regenerate(config, tmp_path / "r").digest == manifest.digest
    asker.bad, asker.pool = {6}, 5
    manifest = stage.regenerate(config, tmp_path / "r")
    assert said(tmp_path / "r") == [*whole, "It is 5.", "It i"] and manifest.counts["pool_cut"] == 1
    asker.bad, asker.pool = set(), 100
    manifest = stage.regenerate(config, tmp_path / "r")
    stage.regenerate(config, tmp_path / "r")
    assert said(tmp_path / "r") == [*whole, "It is 5.", "It is 6."]
    assert (manifest.counts["retry"], manifest.info["finish_reasons"]) == (0, {"stop": 5})
    assert asker.asked == [[1, 2, 3, 4, 5, 6], [5, 6], [5, 6], [5, 6], [5, 6], [6]]


def test_a_whole_answer_shorter_than_the_cut_one_replaces_it(config, asker, tmp_path, monkeypatch) -> None:
    """Another machine rounds otherwise: what ended by itself is the answer, however long the cut one is."""
    asker.pool = 5
    stage.regenerate(config, tmp_path / "r")
    asker.pool = 100
    told = asker._answer
    monkeypatch.setattr(asker, "_answer", lambda row: told(row) | {"response_tokens": 2})
    manifest = stage.regenerate(config, tmp_path / "r")
    assert said(tmp_path / "r")[-1] == "It is 6." and manifest.counts["retry"] == 0


def test_where_everything_failed_the_next_run_asks_everything(config, asker, tmp_path) -> None:
    asker.bad = set(range(1, 7))
    with pytest.raises(DraftlineError, match="No prompt was answered.*6 failed; the first, row 1: CUDA error"):
        stage.regenerate(config, tmp_path / "r")
    asker.bad = set()
    assert stage.regenerate(config, tmp_path / "r").counts["rows"] == 6
    assert asker.asked == [[1, 2, 3, 4, 5, 6]] * 2


def test_an_interrupted_run_keeps_its_answers_whatever_the_chunks_are_now(config, asker, tmp_path) -> None:
    asker.fatal, asker.bad = 5, {1}
    with pytest.raises(DraftlineError, match="died"):
        stage.regenerate(config, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    asker.fatal, asker.bad = 0, set()
    ask = dataclasses.replace(config.corpus.regenerate, concurrency=1)  # what the error advises
    lower = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, regenerate=ask))
    stage.regenerate(lower, tmp_path / "r")
    assert asker.asked[1:] == [[5, 6, 1]], "new ones first, so that a job stopped again and again gets on"
    assert said(tmp_path / "r") == [f"It is {n}." for n in range(1, 7)]


def test_a_run_killed_while_its_manifest_was_made_has_its_answers(config, asker, tmp_path, monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(artifact, "code_version", killed)
        stage.regenerate(config, tmp_path / "r")
    assert stage.regenerate(config, tmp_path / "r").counts["rows"] == 6
    assert asker.asked == [[1, 2, 3, 4, 5, 6]]


def test_a_second_writer_is_refused(config, asker, tmp_path) -> None:
    with (
        artifact.create(tmp_path / "r", KIND, config={}),
        pytest.raises(DraftlineError, match="is being written by another process"),
    ):
        stage.regenerate(config, tmp_path / "r")
    assert not asker.asked


def test_an_artifact_that_no_finished_run_tells_of_is_recorded(config, asker) -> None:
    manifest = job.stage(config)
    kept = recorder(config)
    find = lambda: kept.client.search_runs([kept.experiment_id], "tags.`draftline.stage` = 'regenerate'")  # noqa: E731
    (first,) = find()
    assert first.data.tags["artifact_digest"] == manifest.digest and first.data.metrics["rows"] == 6
    job.stage(config)
    assert len(find()) == 1
    kept.client.delete_run(first.info.run_id)
    job.stage(config)
    (again,) = find()
    assert again.data.tags["artifact_digest"] == manifest.digest and len(asker.asked) == 1


@pytest.mark.parametrize(("threads", "set_to"), [(0, []), (3, [3])])
def test_no_threads_leaves_torchs_own(threads, set_to, tmp_path, monkeypatch) -> None:
    given: list[int] = []

    class Quiet:
        def __init__(self, *_: Any) -> None: ...
        def __call__(self, batch: Any) -> dict[str, Any]:
            return {"row": []}

    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(stage, "Regenerator", Quiet)
    config = compose(settings(tmp_path))
    engine = dataclasses.replace(config.engine, threads=threads)
    actor = stage.RegenerationActor(config.target, engine, stage._settings(RegenerateConfig()), "", str(tmp_path))
    actor({"chunk": [0], "rows": ["[]"]})  # type: ignore[dict-item]
    assert given == set_to
    with pytest.raises(ConfigError, match="corpus.regenerate.threads=-1 must be 0 or more"):
        compose(settings(tmp_path, "corpus.regenerate.threads=-1"))


@pytest.fixture
def ray_here() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.ray
def test_a_mistake_that_an_actor_finds_is_one_line_and_status_2(ray_here, tmp_path, capsys) -> None:
    overrides = settings(tmp_path, "engine.kv_gib=0.0000001")
    assert run(job.stage, "regenerate", overrides) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("regenerate: ")]
    assert len(error) == 1 and error[0].startswith("regenerate: engine.kv_gib=1e-07 holds not a single page of")


def test_no_answer_takes_the_place_of_one_that_says_more() -> None:
    """A final answer stays whatever comes behind it: a run that was killed may have left parts of an older one."""

    def answer(tokens: int, *, retry: bool = False, error: str | None = None) -> dict[str, Any]:
        return {"row": 0, "response_tokens": tokens, "retry": retry, "error": error}

    cut, longer, whole, failed = (
        answer(3, retry=True),
        answer(5, retry=True),
        answer(4),
        answer(9, retry=True, error="x"),
    )
    for answers, kept in (
        ((cut, longer), longer),
        ((longer, cut), longer),
        ((cut, failed), cut),
        ((failed, cut), cut),
        ((longer, whole), whole),
        ((whole, longer), whole),
        ((whole, failed), whole),
    ):
        assert stage._to_keep(answers) == {0: kept}
