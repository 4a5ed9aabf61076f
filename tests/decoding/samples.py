"""Prompts, proposers of every kind with small random drafts, and engines for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, StepCost, make_proposer
from pipeline.decoding.cache import page_bytes
from pipeline.decoding.request import Sequence
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target, load_target
from tests.drafts.samples import small_draft

PROMPTS = ["What is the sum?", "Hello", "Explain why the sky is blue in one sentence, please", "a b a b a b", "def add"]
LONG = 104
"""Tokens of an expected answer to these; NEW: to those that begin alike (conftest.py)."""
NEW = 40
KINDS = {
    "dspark": {},
    "dflash": {
        "algorithm": "dflash",
        "sample_from_anchor": False,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
    "eagle3": {
        "algorithm": "eagle3",
        "num_layers": 1,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
}
NAMES = ["none", "ngram", *KINDS]
ADJUSTED: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.6,
    "logit_bias": {11: 1.5, 30: -100.0},
    "min_p": 0.02,
}
"""What a request asks for whose logits are adjusted in every way."""


def prompt_ids(target: Target) -> list[list[int]]:
    return [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
        )
        for p in PROMPTS
    ]


def greedy_texts(cache_dir: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """transformers' own."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    out = []
    for ids in prompts:
        with torch.inference_mode():
            text = target.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        out.append(text[0, len(ids) :].tolist())
    return out


def proposer_for(target: Target, name: str, rule: str = "coupled", **changes: Any) -> Any:
    """A proposer by name, with a small random draft where it needs one (of changed settings)."""
    if name not in KINDS:
        return make_proposer(name)
    return make_proposer(name, small_draft(target, **{**KINDS[name], **changes}), rule=rule)


class KnownCost(StepCost):
    """Costs that no measured second moves, so that what is decided does not depend on the machine."""

    def observe(self, *_: Any, **__: Any) -> None: ...

    def observe_draft(self, *_: Any) -> None: ...


IDLE = KnownCost([1, 8, 64], [0], [[1.0], [1.05], [1.4]], draft=0.3)
"""Tokens to verify are nearly free, as at batch 1."""


def made_up_cost() -> StepCost:
    return StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]])


def engine_for(target: Target, draft: DSparkDraft, name: str, rule: str = "coupled", **settings: Any) -> Engine:
    """An engine of three places whose step costs are made up, so that nothing is measured."""
    config = EngineConfig(**{"max_requests": 3, "max_context": 512, "threads": 1, "prefill_chunk": 7, **settings})
    engine = Engine(target, config, step_cost=made_up_cost())
    options = {"rule": rule} if name == "dspark" else {}
    engine.set_proposer(make_proposer(name, draft, **options))
    return engine


def engine_with(target: Target, name: str, rule: str = "coupled", **settings: Any) -> Engine:
    """An engine with the proposer of that name (`proposer_for`), where nothing is measured either."""
    config = EngineConfig(**{"max_requests": 3, "max_context": 512, "threads": 1, "rule": rule, **settings})
    return Engine(target, config, proposer_for(target, name, rule), made_up_cost())


def engine_of(target: Target, drafts: Any, pages: int = 0, **changes: Any) -> Engine:
    """An engine whose KV pool has so many pages of 16 tokens, where given."""
    c = target.config
    shapes = [(c.num_key_value_heads, c.head_dim, c.head_dim)] * c.num_hidden_layers
    each = page_bytes(shapes, 16, torch.float32) + drafts.page_bytes(16)
    options: dict[str, Any] = {
        "max_requests": 3,
        "max_context": 512,
        "threads": 1,
        "prefill_chunk": 23,
        "scheduler": "fixed",
    }
    if pages:
        options["kv_gib"] = (pages + 0.5) * each / 2**30
    engine = Engine(target, EngineConfig(**{**options, **changes}), drafts)
    assert pages == 0 or engine.runner.pool.pages == pages
    return engine


def sequences(count: int, prompt: int = 5) -> list[Sequence]:
    """Of requests that don't end, with nothing decoded yet."""
    return [Sequence(Request([1] * prompt, max_new_tokens=10**6), frozenset(), [1] * prompt) for _ in range(count)]


def same_rounds(a: Any, b: Any) -> bool:
    """Whether the drafts saw the same: what was verified and accepted at every position."""
    return all((m.lengths, m.accepted_at) == (n.lengths, n.accepted_at) for m, n in zip(a, b, strict=True))
