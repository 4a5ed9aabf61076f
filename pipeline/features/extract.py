"""Extraction: Ray Data streams pieces of a corpus through actors that hold the frozen target.

A shard is a function of its rows, written aside and renamed, then noted in a file beside it, which stays in the
artifact. Whoever dies, an actor or the driver, the shards that are noted are kept and the others are made again: no
sample is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifact
from pipeline.actors import num_gpus, over_actors, telling
from pipeline.config import FeaturesConfig, TargetConfig, to_plain
from pipeline.corpus.build import RowReader, Split
from pipeline.drafts.config import default_layer_ids
from pipeline.errors import ConfigError, DraftlineError
from pipeline.features.forward import feature_rows
from pipeline.features.store import check_identity, shard_name, write_shard
from pipeline.target import load_config, load_identity, load_target, obtain, validate_layer_ids

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_PRINT_SECONDS = 2.0


class Extractor:
    """Makes one shard per call; loads the target at the first."""

    def __init__(
        self, config: FeaturesConfig, target: TargetConfig, corpus: str, split: Split, out: str, cache: str
    ) -> None:
        self.config = config
        self.target_config = dataclasses.replace(target, dtype=config.compute_dtype or target.dtype)
        self.out, self.cache = Path(out), Path(cache)
        self.rows = RowReader(corpus, split)
        self.target: Any = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        # Ray Data may call from another thread than the constructor's, and torch counts threads per caller.
        torch.set_num_threads(self.config.threads)
        if self.target is None:
            self.target = load_target(self.target_config, self.cache)
        index = int(batch["shard"][0])
        began = time.perf_counter()
        size = self.config.shard_rows
        rows = self.rows.rows(range(index * size, min((index + 1) * size, len(self.rows))))
        made = feature_rows(self.target, rows, self.config.target_layer_ids, self.config.batch_tokens)
        good = [r for r in made if r is not None]
        bad = [r.sample_id for r, m in zip(rows, made, strict=True) if m is None]
        file = self.out / shard_name(index)
        hidden = self.target.hidden_size
        write_shard(file, good, len(self.config.target_layer_ids) * hidden, hidden)
        tokens = sum(len(r.input_ids) for r in good)
        note = {"rows": len(good), "tokens": tokens, "bytes": file.stat().st_size, "not_finite": bad}
        artifact.write_json(self.out / f"{shard_name(index)}.json", note)
        spent = time.perf_counter() - began
        return {"shard": np.array([index]), "tokens": np.array([tokens]), "seconds": np.array([spent])}


def stage_config(config: FeaturesConfig, target: TargetConfig, split: Split) -> dict[str, Any]:
    """The settings that decide what extraction produces, with the dtype computed in resolved.

    Raises:
        ConfigError: a dtype that features can't be stored or computed in, or a size below 1.
    """
    if config.dtype != "bfloat16":
        raise ConfigError(f"features.dtype={config.dtype!r}: features are stored as bfloat16 only.")
    dtype = config.compute_dtype or target.dtype
    if dtype not in _COMPUTE_DTYPES:
        raise ConfigError(f"features.compute_dtype={dtype!r} must be one of {', '.join(_COMPUTE_DTYPES)}.")
    for name in ("shard_rows", "batch_tokens", "actors", "threads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"features.{name}={getattr(config, name)} must be at least 1.")
    plain = to_plain(config)
    for name in ("actors", "threads", "mode", "batch_tokens", "gpus_per_actor"):
        plain.pop(name)  # how it is computed, not what
    return plain | {"compute_dtype": dtype, "split": split}


def with_layers(config: FeaturesConfig, target: TargetConfig, cache_dir: Path | str) -> FeaturesConfig:
    """The configuration with the layers named: those of `target_layer_ids`, or a draft's default for this target."""
    if config.target_layer_ids:
        return config
    layers = int(_model_config(target, cache_dir).get_text_config().num_hidden_layers)
    return dataclasses.replace(config, target_layer_ids=default_layer_ids(layers))


def extract(
    config: FeaturesConfig,
    target: TargetConfig,
    corpus_dir: Path | str,
    out: Path | str,
    cache_dir: Path | str,
    split: Split = "train",
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Extracts the features of one split of a corpus into a features artifact; Ray must be initialised.

    One that is there and was made from the same things is returned as it is; an interrupted one is gone on with.
    `begin` is called when there is work to do.

    Returns:
        Manifest of kind "features". counts: rows, tokens, shards, not_finite (rows left out). info:
        target_layer_ids, hidden_size, not_finite [{shard, sample_id}], shards [{name, rows, tokens}].

    Raises:
        ArtifactError: the corpus was made with another tokenizer. ConfigError: layer ids that don't exist.
        DraftlineError: no row has finite features, an actor that keeps dying, or what one said of a user's mistake.
    """
    corpus = artifact.load(corpus_dir, "corpus")
    config = with_layers(config, target, cache_dir)
    plain = stage_config(config, target, split)
    inputs = {"corpus": corpus.digest}
    identity = load_identity(target, Path(cache_dir)).as_dict()
    if (done := artifact.current(out, "features", config=plain, inputs=inputs, target=identity)) is not None:
        return done
    begin()
    rows, hidden_size = check(config, target, corpus_dir, cache_dir, split)
    total = -(-rows // config.shard_rows)
    with artifact.create(out, "features", config=plain, inputs=inputs, target=identity, resumable=True) as staging:
        missing = [{"shard": i} for i in range(total) if _note(staging.path, i) is None]
        print(f"extract: {rows} rows in {total} shards, {total - len(missing)} done before", flush=True)
        if missing:
            _make(missing, config, target, (str(Path(corpus_dir).absolute()), split, str(staging.path)), cache_dir)
        notes = [n for n in (_note(staging.path, i) for i in range(total)) if n is not None]
        bad = [{"shard": i, "sample_id": s} for i, n in enumerate(notes) for s in n["not_finite"]]
        kept = sum(n["rows"] for n in notes)
        if len(notes) != total or kept + len(bad) != rows:
            raise RuntimeError(f"{len(notes)} of {total} shards with {kept} + {len(bad)} of {rows} rows were made")
        if not kept:
            raise DraftlineError(
                f"The features of all {rows} {split} rows are not finite. Use features.compute_dtype=float32, or check "
                "the target's weights."
            )
        for stray in staging.path.glob(".shard-*"):
            stray.unlink()
        for b in bad:
            print(f"extract: shard {b['shard']}, sample {b['sample_id']}: features not finite, left out", flush=True)
        staging.counts |= {
            "rows": kept,
            "tokens": sum(n["tokens"] for n in notes),
            "shards": total,
            "not_finite": len(bad),
        }
        staging.info |= {
            "target_layer_ids": list(config.target_layer_ids),
            "hidden_size": hidden_size,
            "not_finite": bad,
            "shards": [{"name": shard_name(i), "rows": n["rows"], "tokens": n["tokens"]} for i, n in enumerate(notes)],
        }
    return artifact.load(out, "features", verify=False)


def check(
    config: FeaturesConfig, target: TargetConfig, corpus_dir: Path | str, cache_dir: Path | str, split: Split
) -> tuple[int, int]:
    """Checks what can be checked without the target's weights; raises as `extract`.

    Returns:
        The split's rows, and the target's hidden size.
    """
    stage_config(config, target, split)
    corpus = artifact.load(corpus_dir, "corpus", verify=False)
    check_identity(corpus, load_identity(target, Path(cache_dir)).as_dict(), corpus_dir)
    model = _model_config(target, cache_dir).get_text_config()
    validate_layer_ids(config.target_layer_ids, int(model.num_hidden_layers))
    if not (rows := corpus.counts[f"{split}_rows"]):
        raise DraftlineError(f"{corpus_dir} has no {split} rows. Give more conversations (corpus.source).")
    return rows, int(model.hidden_size)


def _model_config(target: TargetConfig, cache_dir: Path | str) -> Any:
    return load_config(obtain(target, Path(cache_dir)))


def _make(
    missing: list[dict[str, int]],
    config: FeaturesConfig,
    target: TargetConfig,
    places: tuple[str, Split, str],
    cache_dir: Path | str,
) -> None:
    """Makes shards with Ray Data."""
    given = (config, target, *places, str(Path(cache_dir).absolute()))
    gpus = num_gpus(target, config.gpus_per_actor)
    with telling(
        "A shard's extracting actor died",
        f"The usual cause is memory: lower features.batch_tokens (now {config.batch_tokens}) or features.actors (now "
        f"{config.actors}). What was made is kept; the same command goes on.",
    ):
        made = over_actors(missing, Extractor, given, actors=config.actors, gpus=gpus)
        _follow(made, len(missing), min(config.actors, len(missing)))


def _follow(made: Iterable[dict[str, Any]], count: int, actors: int) -> None:
    """Waits for shards, with progress."""
    began, printed, tokens, busy = time.monotonic(), 0.0, 0, 0.0
    for n, row in enumerate(made, start=1):
        tokens, busy, now = tokens + row["tokens"], busy + row["seconds"], time.monotonic()
        if now - printed < _PRINT_SECONDS and n < count:
            continue
        printed, left = now, (now - began) / n * (count - n)
        # Tokens per second of work: over the time since the start, loading the target would weigh in at first.
        print(f"extract: shard {n}/{count}, {tokens * actors / busy:.0f} tokens/s, {left:.0f} s left", flush=True)


def _note(staging: Path, index: int) -> dict[str, Any] | None:
    """What was noted of a shard once it was whole, None if it is still to be made."""
    file = staging / shard_name(index)
    try:
        note: dict[str, Any] = json.loads((staging / f"{file.name}.json").read_text())
        return note if file.stat().st_size == note["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None
