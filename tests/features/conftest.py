"""A corpus tokenized for the tiny target, made once per session."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline.config import CorpusConfig, FeaturesConfig, TargetConfig
from pipeline.corpus.build import build_corpus
from pipeline.target import load_identity, load_tokenizer

TARGET = TargetConfig(path="tiny")
FEATURES = FeaturesConfig(target_layer_ids=[0, 2], shard_rows=4, batch_tokens=256, threads=1)


@pytest.fixture(scope="session")
def corpus_dir(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training rows of different lengths, all distinct."""
    folder = tmp_path_factory.mktemp("corpus")
    return make_corpus(folder, cache_dir, 26)


@pytest.fixture(scope="package")
def ray_here():
    """Ray in this process, with CPUs enough for Ray Data's own actors."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def make_corpus(folder: Path, cache_dir: Path, rows: int) -> Path:
    """A corpus artifact of `rows` training rows under `folder`, tokenized for the tiny target."""
    words = ["apples", "pears", "seven", "twelve", "sky", "blue", "the", "of", "hello", "draft", "target", "block"]
    rng = random.Random(0)
    lines = []
    for n in range(rows):
        answer = " ".join(rng.choices(words, k=rng.randint(8, 40)))
        talk = [
            {"role": "user", "content": f"Question {n}: {rng.choice(words)}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": talk}) + "\n")
    source = folder / "talk.jsonl"
    source.write_text("".join(lines))
    config = CorpusConfig(source=str(source), heldout_fraction=0.0, max_length=128)
    tokenizer = load_tokenizer(TARGET, cache_dir)
    build_corpus(config, tokenizer, load_identity(TARGET, cache_dir).as_dict(), folder / "corpus")
    return folder / "corpus"
