"""Drafts that survive bfloat16, and damage to the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target
from tests.drafts.samples import small_draft
from tests.drafts.test_parity import training_logits

Damage = Callable[[Path], None]


def rounded(target: Target, **changes: Any) -> DSparkDraft:
    """A draft whose weights are bfloat16 numbers already, as is its target's embedding; of the whole vocabulary unless
    `vocabulary` says otherwise."""
    with torch.no_grad():
        target.family.embed_tokens.weight.copy_(target.family.embed_tokens.weight.bfloat16())
    draft = small_draft(target, **{"vocabulary": 0, **changes})
    with torch.no_grad():
        for weight in draft.parameters():
            weight.copy_(weight.bfloat16())
    return draft


def same_logits(one: DSparkDraft, other: DSparkDraft, target: Target) -> None:
    """Asserts equal logits and confidences, bit for bit, of one block."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, target.vocab_size, (12,), generator=g)
    taps = torch.randn(12, len(one.config.target_layer_ids) * target.hidden_size, generator=g)
    proposed = torch.randint(3, target.vocab_size, (one.config.tokens_per_block,), generator=g)
    hidden = torch.randn(3, target.hidden_size, generator=g)
    logits = training_logits(one, tokens, taps, 9, proposed)
    assert torch.equal(logits, training_logits(other, tokens, taps, 9, proposed))
    assert logits.std() > 0.1  # not a comparison of nothing
    assert torch.equal(one.d2t, other.d2t)
    mine, theirs = one.confidence(hidden, proposed[:3]), other.confidence(hidden, proposed[:3])
    assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        change(held)
        save_file(held, path / "model.safetensors")

    return damage


def settings(part: str = "", **changes: Any) -> Damage:
    """Changes fields of config.json, or of an object in it; None takes a field away."""

    def damage(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        inner = raw[part] if part else raw
        for name, value in changes.items():
            if value is None:
                del inner[name]
            else:
                inner[name] = value
        (path / "config.json").write_text(json.dumps(raw))

    return damage
