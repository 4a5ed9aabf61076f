"""Answers prompts with the target itself: the corpus a draft should learn from.

ray job submit --working-dir . -- python jobs/regenerate.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline corpus.regenerate.limit=0
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import MANIFEST, digest_json, sha256_file, write_json
from pipeline.config import EngineConfig, PipelineConfig, TargetConfig
from pipeline.corpus.conversations import Quarantined
from pipeline.corpus.regeneration import (
    Regenerator,
    ResponseSettings,
    prompt_rows,
    read_provenance,
    rows_of,
    write_conversations,
)
from pipeline.corpus.rows import ChatFormat
from pipeline.entry import StageRecord, run
from pipeline.errors import ArtifactError, ConfigError, DraftlineError
from pipeline.features.extract import TRIES, num_gpus
from pipeline.registry.recorder import ARTIFACT, identity_tags
from pipeline.target import load_tokenizer
from pipeline.target.loading import load_identity


class RegenerationActor:
    """Answers one chunk of prompts per call and leaves it on disk; a chunk found there is not answered again."""

    def __init__(
        self, target: TargetConfig, engine: EngineConfig, settings: ResponseSettings, cache: str, parts: str
    ) -> None:
        self.engine, self.parts = engine, Path(parts)
        self.regenerator = Regenerator(target, engine, settings, cache)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        # Ray Data may call from another thread than the constructor's, and torch counts threads per caller.
        torch.set_num_threads(self.engine.threads)
        chunk = int(batch["chunk"][0])
        rows = json.loads(batch["rows"][0])
        columns = {name: np.array([r[name] for r in rows], dtype=object) for name in ("messages", "source")}
        answered = list(rows_of(self.regenerator({"row": np.array([r["row"] for r in rows]), **columns})))
        write_json(self.parts / f"chunk-{chunk:05d}.json", answered)
        tokens = sum(r["response_tokens"] for r in answered)
        return {"chunk": np.array([chunk]), "tokens": np.array([tokens])}


def _follow(answered: Iterable[dict[str, Any]], count: int) -> None:
    """Waits for chunks, with progress."""
    began, tokens = time.monotonic(), 0
    for n, row in enumerate(answered, start=1):
        tokens += row["tokens"]
        spent = time.monotonic() - began
        left = spent / n * (count - n)
        print(f"regenerate: chunk {n}/{count}, {tokens} tokens, {tokens / spent:.0f}/s, {left:.0f} s left", flush=True)


def regenerate(config: PipelineConfig, out: Path, begin: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Regenerates `config.corpus.regenerate.prompts` into `out` (a .jsonl.zst with manifest.json beside it).

    Interrupted, it goes on with the chunks that are missing. Needs Ray to be initialised. `begin` is called when there
    is work to do.

    Raises:
        ConfigError: answers of `max_new_tokens` that no prompt leaves room for.
        DraftlineError: no usable prompt, none that was answered, or an actor that keeps dying.
    """
    import ray

    ask = config.corpus.regenerate
    settings = ResponseSettings(ask.temperature, ask.top_k, ask.top_p, ask.max_new_tokens, ask.seed)
    target = dataclasses.replace(config.target, dtype=ask.dtype or config.target.dtype)
    engine = dataclasses.replace(
        config.engine, max_requests=ask.concurrency, threads=ask.threads, max_queue=4 * ask.concurrency
    )
    if ask.max_new_tokens >= engine.max_context:
        raise ConfigError(
            f"corpus.regenerate.max_new_tokens={ask.max_new_tokens} leaves no prompt any room in engine.max_context="
            f"{engine.max_context}, which holds prompt and answer. Raise engine.max_context, or ask for fewer tokens."
        )
    quarantine: list[Quarantined] = []
    rows = list(prompt_rows(ask.prompts, quarantine, ask.limit))
    for bad in quarantine:
        print(f"regenerate: row {bad.row} of {ask.prompts} left out: {bad.reason}", flush=True)
    if not rows:
        raise DraftlineError(f"corpus.regenerate.prompts={ask.prompts} holds no usable prompt.")
    info = {
        "target": load_identity(target, config.cache).as_dict(),
        "sampling": {**dataclasses.asdict(settings), "dtype": target.dtype, "max_context": engine.max_context},
        "system_prompt": config.target.system_prompt,
        "prompts": {"file": Path(ask.prompts).name, "sha256": sha256_file(Path(ask.prompts)), "rows": len(rows)},
        "quarantined": len(quarantine),
    }
    manifest: dict[str, Any] = {}
    if out.is_file():
        # What was interrupted between its two files, or edited, is made again.
        with contextlib.suppress(ArtifactError):
            manifest = read_provenance(out)
    if manifest and all(manifest.get(k) == v for k, v in info.items()):
        print(f"regenerate: skipped, prompts and settings unchanged ({out})", flush=True)
        return manifest
    begin()
    ChatFormat(load_tokenizer(config.target, config.cache))  # a template that can't be used is one line here
    per_chunk = 2 * ask.concurrency
    key = digest_json([info, per_chunk])  # chunks of another size hold other prompts under the same number
    parts = out.parent / f".{out.name}.parts-{key[:12]}"
    parts.mkdir(parents=True, exist_ok=True)
    chunks = [
        {"chunk": n, "rows": json.dumps(rows[i : i + per_chunk])}
        for n, i in enumerate(range(0, len(rows), per_chunk))
        if not (parts / f"chunk-{n:05d}.json").is_file()
    ]
    total = -(-len(rows) // per_chunk)
    print(f"regenerate: {len(rows)} prompts in {total} chunks, {total - len(chunks)} done before", flush=True)
    if chunks:
        answered = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            RegenerationActor,
            batch_size=1,
            num_cpus=1,
            num_gpus=num_gpus(target),
            compute=ray.data.ActorPoolStrategy(size=ask.actors),
            max_task_retries=TRIES - 1,
            fn_constructor_args=(target, engine, settings, str(config.cache), str(parts)),
        )
        try:
            _follow(answered.iter_rows(), len(chunks))
        except ray.exceptions.RayActorError as e:
            raise DraftlineError(
                f"An actor died {TRIES} times on the same prompts (the last: {' '.join(str(e).split())[:300]}). "
                f"The usual cause is memory: lower corpus.regenerate.concurrency (now {ask.concurrency}) or "
                f"corpus.regenerate.actors (now {ask.actors})."
            ) from None
    done = [r for n in range(total) for r in json.loads((parts / f"chunk-{n:05d}.json").read_text())]
    manifest = write_conversations(out, done, info)
    for part in parts.iterdir():
        part.unlink()
    parts.rmdir()
    return manifest


def stage(config: PipelineConfig, parent: str | None = None) -> dict[str, Any]:
    out = config.run_dir / "regenerated" / "conversations.jsonl.zst"
    print("== regenerate", flush=True)
    with StageRecord("regenerate", config, parent) as record:
        manifest = regenerate(config, out, record.begin)
        if record.begun:
            run_ = record.begin()
            run_.tag(identity_tags(manifest["target"]) | {ARTIFACT: manifest["sha256"]})
            run_.log_input("prompts", manifest["prompts"]["sha256"], config.corpus.regenerate.prompts, "regenerate")
            run_.log_metrics({k: float(v) for k, v in manifest["counts"].items()})
            run_.log_dict(manifest, MANIFEST)
    counts = manifest["counts"]
    print(f"regenerate: {counts} -> {out}", flush=True)
    if counts.get("clipped"):
        print(
            f"regenerate: WARNING: {counts['clipped']} of {counts['rows']} prompts left their answers less room than "
            f"corpus.regenerate.max_new_tokens={config.corpus.regenerate.max_new_tokens} in engine.max_context="
            f"{config.engine.max_context}; {counts['clipped_cut']} answers were cut by it. Raise engine.max_context to "
            "have them whole.",
            flush=True,
        )
    return manifest


if __name__ == "__main__":
    sys.exit(run(stage, name="regenerate", settings=("corpus.regenerate", "target"), page="corpus"))
