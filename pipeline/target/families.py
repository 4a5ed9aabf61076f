"""One adapter per family of targets: where its embedding, layers, final norm and lm_head live."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from pipeline.errors import DraftlineError

_PLAIN = ("llama", "qwen3", "qwen3_moe")


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a causal language model.

    Attributes:
        backbone: embedding to final norm, no lm_head.
        embed_scale: factor on embeddings (1 except in Gemma-like families).
        logit_softcap: c in c * tanh(logits / c), or None.
    """

    name: str
    backbone: nn.Module
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Module
    embed_scale: float = 1.0
    logit_softcap: float | None = None


def family_of(model: Any) -> Family:
    """The adapter of a loaded transformers model.

    Raises:
        DraftlineError: a family that is not supported.
    """
    kind = model.config.model_type
    if kind not in _PLAIN:
        raise DraftlineError(
            f"The target's model_type is {kind!r}; supported are {', '.join(_PLAIN)}. "
            "A family is added in pipeline/target/families.py."
        )
    backbone = model.model
    return Family(kind, backbone, backbone.embed_tokens, backbone.layers, backbone.norm, model.lm_head)
