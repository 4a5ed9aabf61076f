"""A target's size, from its config.json alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.config import TargetConfig
from pipeline.errors import DraftlineError
from pipeline.target.families import family_of
from pipeline.target.loading import load_config
from pipeline.target.obtain import config_file


@dataclasses.dataclass(frozen=True)
class TargetSize:
    """A target without its weights.

    Attributes:
        parameters: all of them. active: those that a token's forward multiplies with, of the layers alone (no
            embedding, no lm_head; of experts the share that a token is routed to).
        attention: products of a token with each token before it, over all layers (attention counted as full).
        tied: lm_head is the embedding.
        embed_scale, logit_softcap: the family's (see `pipeline.target.families.Family`).
    """

    config: Any
    parameters: int
    active: float
    attention: int
    tied: bool
    embed_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)


def size_target(target: TargetConfig, file: str, cache: Path) -> TargetSize:
    """Counts a target's parameters from its config.json, without its weights.

    Args:
        file: the config.json; "" takes the target's own (of the hub, only that file is fetched).
    Raises:
        DraftlineError: no such file, not a model's, or of a family that is not supported.
    """
    path = Path(file) if file else config_file(target, cache)
    config = load_config(path)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as e:
        raise DraftlineError(f"{path} is not the config.json of a model that transformers can build: {e}") from None
    family = family_of(model)
    text = config.get_text_config()
    named = dict(model.named_parameters())
    experts = sum(q.numel() for n, q in named.items() if ".experts." in n)
    share = 0.0
    if experts:
        of = getattr(text, "num_experts", None) or text.n_routed_experts
        share = experts * text.num_experts_per_tok / of
    layers = sum(q.numel() for n, q in named.items() if ".layers." in n and ".experts." not in n)
    kinds = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers  # Gemma 4's layers differ
    widths = [
        k.num_attention_heads * (getattr(k, "head_dim", 0) or k.hidden_size // k.num_attention_heads) for k in kinds
    ]
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return TargetSize(
        text,
        sum(q.numel() for q in named.values()),
        layers + share,
        2 * sum(widths),
        tied,
        family.embed_scale,
        family.logit_softcap,
    )
