"""Extraction: Ray Data streams pieces of a corpus through actors that hold the frozen target.

A shard is a function of its rows, written aside and renamed, with a digest beside it. Whoever dies, an actor or the
driver, the shards that are there are kept and the others are made again: no sample is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifact
from pipeline.config import FeaturesConfig, TargetConfig, to_plain
from pipeline.corpus.build import read_rows
from pipeline.features.forward import features_of
from pipeline.features.store import check_identity, shard_name, write_shard
from pipeline.target import load_target, load_tokenizer, validate_layer_ids
from pipeline.target.loading import load_identity


class Extractor:
    """Makes one shard per call; loads the target at the first."""

    def __init__(self, config: FeaturesConfig, target: TargetConfig, corpus: str, out: str, cache: str) -> None:
        self.config = config
        self.target_config = dataclasses.replace(target, dtype=config.compute_dtype or target.dtype)
        self.out, self.cache = Path(out), Path(cache)
        self.rows = read_rows(corpus, "train")
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
        rows = self.rows[index * size : (index + 1) * size]
        made = features_of(self.target, rows, self.config.target_layer_ids, self.config.batch_tokens)
        good = [r for r in made if r is not None]
        bad = [r.sample_id for r, m in zip(rows, made, strict=True) if m is None]
        if good:
            write_shard(self.out / shard_name(index), good)
        tokens = sum(len(r.input_ids) for r in good)
        note = {"rows": len(good), "tokens": tokens, "not_finite": bad}
        artifact.write_json(self.out / f"{shard_name(index)}.json", note)
        spent = time.perf_counter() - began
        return {"shard": np.array([index]), "tokens": np.array([tokens]), "seconds": np.array([spent])}


def stage_config(config: FeaturesConfig) -> dict[str, Any]:
    """The settings that decide what extraction produces."""
    plain = to_plain(config)
    for name in ("actors", "threads", "mode"):
        plain.pop(name)
    return plain


def extract(
    config: FeaturesConfig, target: TargetConfig, corpus_dir: Path, out: Path, cache_dir: Path
) -> artifact.Manifest:
    """Extracts the features of a corpus' training rows into a features artifact; Ray must be initialised.

    Raises:
        ArtifactError: the corpus was made with another tokenizer. ConfigError: layer ids that don't exist.
    """
    import ray

    corpus = artifact.load(corpus_dir, "corpus")
    plain = stage_config(config)
    inputs = {"corpus": corpus.digest}
    if (done := artifact.current(out, "features", config=plain, inputs=inputs)) is not None:
        return done
    tokenizer = load_tokenizer(target, cache_dir)
    identity = load_identity(target, cache_dir, tokenizer)
    check_identity(corpus, identity.as_dict(), corpus_dir)
    validate_layer_ids(config.target_layer_ids, _num_layers(target, cache_dir))
    total = -(-len(read_rows(corpus_dir, "train")) // config.shard_rows)
    with artifact.create(
        out, "features", config=plain, inputs=inputs, target=identity.as_dict(), resumable=True
    ) as staging:
        missing = [{"shard": i} for i in range(total) if not (staging.path / f"{shard_name(i)}.json").is_file()]
        print(f"extract: {total} shards, {total - len(missing)} done before", flush=True)
        if missing:
            results = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
                Extractor,
                batch_size=1,
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=config.actors),
                fn_constructor_args=(config, target, str(corpus_dir), str(staging.path), str(cache_dir)),
            )
            began, tokens, busy = time.monotonic(), 0, 0.0
            for n, row in enumerate(results.iter_rows(), start=1):
                tokens, busy = tokens + row["tokens"], busy + row["seconds"]
                left = (time.monotonic() - began) / n * (len(missing) - n)
                if n % max(1, len(missing) // 20) == 0 or n == len(missing):
                    rate = tokens * config.actors / busy
                    print(f"extract: shard {n}/{len(missing)}, {rate:.0f} tokens/s, {left:.0f} s left", flush=True)
        notes = [json.loads((staging.path / f"{shard_name(i)}.json").read_text()) for i in range(total)]
        for i in range(total):
            (staging.path / f"{shard_name(i)}.json").unlink()
        for stray in staging.path.glob(".shard-*"):
            stray.unlink()
        bad = [{"shard": i, "sample_id": s} for i, n in enumerate(notes) for s in n["not_finite"]]
        for b in bad:
            print(f"extract: shard {b['shard']}, sample {b['sample_id']}: features not finite, left out", flush=True)
        staging.counts |= {
            "rows": sum(n["rows"] for n in notes),
            "tokens": sum(n["tokens"] for n in notes),
            "shards": total,
            "not_finite": len(bad),
        }
        staging.info |= {
            "target_layer_ids": config.target_layer_ids,
            "not_finite": bad,
            "shards": [
                {"name": shard_name(i), "rows": n["rows"], "tokens": n["tokens"]}
                for i, n in enumerate(notes)
                if n["rows"]
            ],
        }
    return artifact.load(out, "features", verify=False)


def _num_layers(target: TargetConfig, cache_dir: Path) -> int:
    from transformers import AutoConfig

    from pipeline.target import obtain

    return int(AutoConfig.from_pretrained(obtain(target, cache_dir)).get_text_config().num_hidden_layers)
