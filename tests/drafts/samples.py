"""Small drafts with weights that matter: every head non-zero, so that a path left out changes the numbers."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.drafts.checkpoint import make_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target


def small_draft(target: Target, *, vocabulary: int = 60, seed: int = 0, **changes: Any) -> DSparkDraft:
    """A random draft of the tiny target: block 4, two layers, taps of layers 0 and 2."""
    settings: dict[str, Any] = {"block_size": 4, "num_layers": 2, "target_layer_ids": [0, 2], "markov_rank": 6}
    settings |= {"draft_vocab_size": vocabulary, **changes}
    config = resolve(DraftConfig(**settings), target.config, target.unused_token)
    generator = torch.Generator().manual_seed(seed)
    d2t = torch.randperm(target.vocab_size, generator=generator)[: vocabulary or target.vocab_size].sort().values
    draft = make_draft(config, target, d2t)
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.empty(weight.shape).normal_(0.0, 0.1, generator=generator)
            weight.copy_(noise + (1.0 if weight.dim() == 1 and weight.shape[0] > 1 else 0.0))
    return draft
