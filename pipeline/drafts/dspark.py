"""DSpark: a block drafter over the target's hidden states, with a Markov head and a confidence head.

Definitions: algorithms 3 and 4 of the house notes; DSpark (arXiv 2607.05147, eqs. 5-7), DFlash (arXiv 2602.06036).
Letters: N context positions, A anchors, B requests, K block size, L taps, D hidden, H query heads, Hkv KV heads, d head
dim, V target vocabulary, Vd draft vocabulary, r Markov rank, G tokens per block.

Slot k of a block at anchor a sits at position a + k. With `sample_from_anchor` (DSpark) it predicts token a + k + 1, so
G = K tokens; without (DFlash's own layout) slot k predicts token a + k and the anchor's slot nothing: G = K - 1. A slot
attends to the context positions strictly before a (within its layer's sliding window, if it has one) and to all slots
of its own block. Slot 0 holds the anchor token's embedding, the others the mask token's. The embedding and the lm_head
rows are the target's, frozen, and not part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.heads import MARKOV_HEADS, ConfidenceHead
from pipeline.drafts.layers import DecoderLayer, RMSNorm

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [T, H, d], k [T, Hkv, d], v [T, Hkv, d]) of the block slots -> [T, H, d], context included."""


class DSparkDraft(Draft):
    """The draft's module: see `pipeline.drafts.base.Draft`."""

    def __init__(
        self,
        config: DraftConfig,
        embed: torch.Tensor,
        lm_head: torch.Tensor,
        d2t: torch.Tensor,
        *,
        embed_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(config, embed, lm_head, d2t, embed_scale=embed_scale, logit_softcap=logit_softcap)
        c = config
        self.fc = nn.Linear(len(c.target_layer_ids) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.has_markov:
            head = MARKOV_HEADS[c.markov_head_type]
            self.markov_head = head(embed.shape[0], d2t.shape[0], c.markov_rank, c.hidden_size)
        size = c.hidden_size + (c.markov_rank if c.has_markov and c.confidence_head_with_markov else 0)
        if c.enable_confidence_head:
            self.confidence_head = ConfidenceHead(size)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """`layers` by their type."""
        return list(self.layers)  # type: ignore[arg-type]

    def context(self, taps: torch.Tensor) -> torch.Tensor:
        """H_ctx [N, D] = RMSNorm(W_c taps) of taps [N, L*D]."""
        return self.hidden_norm(self.fc(taps))

    def context_kv(self, context: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per draft layer: keys and values [N, Hkv, d] of context [N, D] at absolute positions [N]."""
        cos, sin = self.rope(positions)
        return [layer.self_attn.keys_values(context, cos, sin) for layer in self.decoder_layers]

    def block_input(self, anchor_tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [A*K, D] of blocks that start with anchor_tokens [A]."""
        tokens = torch.full(
            (anchor_tokens.shape[0], self.config.block_size), self.config.mask_token_id, device=anchor_tokens.device
        )
        tokens[:, 0] = anchor_tokens
        return self.embedding(tokens.flatten()).to(self.hidden_norm.weight.dtype)

    def block_positions(self, anchors: torch.Tensor) -> torch.Tensor:
        """Positions [A*K] of the slots of blocks anchored at positions [A]."""
        return (anchors[:, None] + torch.arange(self.config.block_size, device=anchors.device)).flatten()

    def blocks(self, anchor_tokens: torch.Tensor, anchors: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Runs the layers over blocks; returns hidden states [A*G, D], after the final norm, of the slots that predict:
        slot j of the result, from 0, stands for token anchor + 1 + j."""
        x = self.block_input(anchor_tokens)
        cos, sin = self.rope(self.block_positions(anchors))
        for i, layer in enumerate(self.decoder_layers):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, cos, sin)
            x = layer.finish(x, attend(i, layer.self_attn.queries(h, cos, sin), k, v))
        if not self.config.sample_from_anchor:
            x = x.unflatten(0, (-1, self.config.block_size))[:, 1:].flatten(0, 1)
        return self.norm(x)
