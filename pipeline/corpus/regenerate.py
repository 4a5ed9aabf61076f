"""The regenerating stage: prompts through actors that hold the target and an engine, on Ray Data.

Every chunk of prompts leaves its answers in the artifact's staging; whoever dies, what was answered is kept. Prompts
that the engine failed at, or had too few pages for, are asked again by the next run, once, whether this one ended or
not: their cause may be mended.

Ray itself is behind pipeline/actors.py: this room knows none of it (CONTRIBUTING.md).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifact
from pipeline.actors import num_gpus, over_actors, telling
from pipeline.config import EngineConfig, PipelineConfig, RegenerateConfig, TargetConfig
from pipeline.corpus.answers import KIND, read_answers, write_answers
from pipeline.corpus.asking import Regenerator, ResponseSettings, prompt_rows, rows_of
from pipeline.corpus.conversations import Quarantined
from pipeline.corpus.rows import ChatFormat
from pipeline.errors import ArtifactError, ConfigError, DraftlineError
from pipeline.target import load_tokenizer
from pipeline.target.loading import load_identity

_CHUNKS = "chunks"


class RegenerationActor:
    """Answers one chunk of prompts per call and leaves it on disk."""

    def __init__(
        self, target: TargetConfig, engine: EngineConfig, settings: ResponseSettings, cache: str, chunks: str
    ) -> None:
        self.threads, self.chunks = engine.threads, Path(chunks)
        self.regenerator = Regenerator(target, engine, settings, cache)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        if self.threads:
            # Ray Data may call from another thread than the constructor's, and torch counts threads per caller.
            torch.set_num_threads(self.threads)
        chunk = int(batch["chunk"][0])
        rows = json.loads(batch["rows"][0])
        columns = {name: np.array([r[name] for r in rows], dtype=object) for name in ("messages", "source")}
        answered = list(rows_of(self.regenerator({"row": np.array([r["row"] for r in rows]), **columns})))
        artifact.write_json(self.chunks / f"{chunk:08d}.json", answered)
        tokens = sum(r["response_tokens"] for r in answered)
        return {"chunk": np.array([chunk]), "tokens": np.array([tokens])}


def regenerate(config: PipelineConfig, out: Path, begin: Callable[[], object] = lambda: None) -> artifact.Manifest:
    """Has the target answer `config.corpus.regenerate.prompts`, into a conversations artifact; Ray must be initialised.

    One that is there and was made from the same things is returned as it is, unless the engine failed at some of its
    prompts or its KV pool cut their answers: those are asked again. An interrupted one is gone on with. `begin` is
    called when there is work to do.

    Returns:
        Manifest of kind "conversations". counts: those of `write_answers`, and quarantined. info: likewise.

    Raises:
        ConfigError: answers of `max_new_tokens` that no prompt leaves room for.
        DraftlineError: no usable prompt, none that was answered, an actor that keeps dying, or what one said of a
            user's mistake.
    """
    ask = config.corpus.regenerate
    target = dataclasses.replace(config.target, dtype=ask.dtype or config.target.dtype)
    if ask.max_new_tokens >= config.engine.max_context:
        raise ConfigError(
            f"corpus.regenerate.max_new_tokens={ask.max_new_tokens} leaves no prompt any room in engine.max_context="
            f"{config.engine.max_context}, which holds prompt and answer. Raise engine.max_context, or ask for fewer "
            "tokens."
        )
    quarantine: list[Quarantined] = []
    rows = list(prompt_rows(ask.prompts, quarantine, ask.limit))
    for bad in quarantine:
        print(f"regenerate: row {bad.row} of {ask.prompts} left out: {bad.reason}", flush=True)
    if not rows:
        raise DraftlineError(f"corpus.regenerate.prompts={ask.prompts} holds no usable prompt.")
    identity = load_identity(target, config.cache).as_dict()
    plain = {
        "sampling": {**dataclasses.asdict(_settings(ask)), "dtype": target.dtype},
        "max_context": config.engine.max_context,
        "system_prompt": target.system_prompt,
        "prompts": len(rows),  # a limit that cuts nothing off makes no other artifact
    }
    inputs = {"prompts": artifact.sha256_file(Path(ask.prompts))}
    done = artifact.current(out, KIND, config=plain, inputs=inputs, target=identity)
    if done is not None and not done.counts["retry"]:
        return done
    begin()
    ChatFormat(load_tokenizer(config.target, config.cache))  # a template that can't be used is one line here
    with artifact.create(out, KIND, config=plain, inputs=inputs, target=identity, resumable=True) as staging:
        chunks = staging.path / _CHUNKS
        chunks.mkdir(exist_ok=True)
        former = read_answers(out) if done is not None and _whole(out) else []
        # Files beside the chunks: whoever wrote them was killed before the manifest was.
        before = [*former, *read_answers(staging.path), *_answered(chunks)]
        found = _to_keep(before)
        asked = [r for r in rows if r["row"] not in found or found[r["row"]]["retry"]]
        # New ones first: a job that is stopped again and again would ask the same ones each time and get no further.
        asked.sort(key=lambda r: r["row"] in found)
        again = sum(r["row"] in found for r in asked)
        print(
            f"regenerate: {len(rows)} prompts, {len(rows) - len(asked)} done before"
            + (f", {again} asked again that the engine failed at or had too few pages for" if again else ""),
            flush=True,
        )
        if asked:
            _ask(asked, config, target, chunks)
            found = _to_keep([*before, *_answered(chunks)])
        counts, info = write_answers(staging.path, (found[r["row"]] for r in rows))
        shutil.rmtree(chunks)
        staging.counts |= {**counts, "quarantined": len(quarantine)}
        staging.info |= info
    return artifact.load(out, KIND, verify=False)


def _settings(ask: RegenerateConfig) -> ResponseSettings:
    return ResponseSettings(ask.temperature, ask.top_k, ask.top_p, ask.max_new_tokens, ask.seed)


def _whole(out: Path) -> bool:
    """Whether the artifact's files are what its manifest says: altered ones are made again."""
    try:
        artifact.load(out, KIND)
        return True
    except ArtifactError:
        return False


def _answered(chunks: Path) -> list[dict[str, Any]]:
    """The rows of all chunks in the chunks' order: of a prompt that was asked twice, the later answer is last."""
    return [row for file in sorted(chunks.glob("*.json")) for row in json.loads(file.read_text())]


def _to_keep(answers: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By row, the last of a prompt's answers; but where it is to be asked again too, one before it that says more, or
    that was final."""
    kept: dict[int, dict[str, Any]] = {}
    for answer in answers:
        former = kept.get(answer["row"])
        if former is None or not answer["retry"] or (former["retry"] and _said(answer) >= _said(former)):
            kept[answer["row"]] = answer
    return kept


def _said(answer: dict[str, Any]) -> int:
    return 0 if answer["error"] else int(answer["response_tokens"])


def _ask(rows: list[dict[str, Any]], config: PipelineConfig, target: TargetConfig, folder: Path) -> None:
    """Answers prompts with Ray Data, and leaves the answers in a folder, by chunks."""
    ask = config.corpus.regenerate
    engine = dataclasses.replace(
        config.engine, max_requests=ask.concurrency, threads=ask.threads, max_queue=4 * ask.concurrency
    )
    # Behind those that are there: a chunk of before may have been of another size, and some of its prompts answered.
    first = 1 + max((int(file.stem) for file in folder.glob("*.json")), default=-1)
    size = 2 * ask.concurrency
    chunks = [
        {"chunk": first + n, "rows": json.dumps(rows[i : i + size])} for n, i in enumerate(range(0, len(rows), size))
    ]
    given = (target, engine, _settings(ask), str(config.cache), str(folder))
    gpus = num_gpus(target)
    with telling(
        "An actor that answers died of the same prompts",
        f"The usual cause is memory: lower corpus.regenerate.concurrency (now {ask.concurrency}) or "
        f"corpus.regenerate.actors (now {ask.actors}). What was answered is kept; the same command goes on.",
    ):
        answered = over_actors(chunks, RegenerationActor, given, actors=ask.actors, gpus=gpus)
        _follow(answered, len(chunks))


def _follow(answered: Iterable[dict[str, Any]], count: int) -> None:
    """Waits for chunks, with progress."""
    began, tokens = time.monotonic(), 0
    for n, row in enumerate(answered, start=1):
        tokens += row["tokens"]
        spent = time.monotonic() - began
        left = spent / n * (count - n)
        print(f"regenerate: chunk {n}/{count}, {tokens} tokens, {tokens / spent:.0f}/s, {left:.0f} s left", flush=True)
