"""A tiny target, a random draft for it and a corpus with held-out prompts of three sources, as artifacts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.config import BenchmarkConfig, CorpusConfig, EngineConfig, TargetConfig
from pipeline.corpus.build import build_corpus
from pipeline.drafts.checkpoint import make_draft, save_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.target import load_target

TARGET = TargetConfig(path="tiny")
ENGINE = EngineConfig(max_requests=4, max_context=256, threads=1)
BENCHMARK = BenchmarkConfig(prompts=4, calibrate_prompts=4, max_new_tokens=12, bootstrap=100)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the artifacts are."""

    cache: Path
    corpus: Path
    draft: Path


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("evaluation")
    cache, corpus, draft = root / "cache", root / "corpus", root / "draft"
    source = root / "conversations.jsonl"
    with source.open("w") as f:
        for i in range(60):
            user = {"role": "user", "content": f"Question {i}: what comes after {i}?"}
            answer = {"role": "assistant", "content": f"After {i} comes {i + 1}, and then comes {i + 2}."}
            f.write(json.dumps({"messages": [user, answer], "source": ("chat", "code", "math")[i % 3]}) + "\n")
    target = load_target(TARGET, cache)
    settings = CorpusConfig(source=str(source), max_length=128, heldout_fraction=0.3)
    build_corpus(settings, target.tokenizer, target.identity.as_dict(), corpus)
    torch.manual_seed(0)
    config = resolve(
        DraftConfig(block_size=4, markov_rank=8, target_layer_ids=[0, 2]), target.config, target.unused_token
    )
    made = make_draft(config, target, torch.arange(0, target.vocab_size, 2))
    save_draft(draft, made, target=target.identity.as_dict(), config={}, inputs={}, info={"steps": 0})
    return Places(cache, corpus, draft)
