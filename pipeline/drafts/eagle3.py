"""Eagle3: an autoregressive draft of one layer over the target's hidden states (arXiv 2503.01840).

Letters: N positions, B rows drafting side by side, L taps, D hidden, H query heads, Hkv KV heads, d head dim, Vd draft
vocabulary, G tokens per block.

Position i of a text is the pair (g_i, token i + 1): g_i = W_c taps_i where the target has been, the draft's own output
where it has not. Both are normalised and laid side by side, which is what attention reads (2 D wide); the residual
stream starts at g_i. The output at i, after a norm, gives the logits of token i + 2, and before it is the g of the
next position. A block at anchor a therefore starts at position a - 1, whose pair is (g of the last text position before
the anchor, the anchor), and its slot k predicts token a + 1 + k, as a block drafter's does. Rotary positions are the
pairs'. The embedding and the lm_head rows are the target's, frozen, and not part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.layers import DecoderLayer, RMSNorm

AttendOne = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [B, H, d], k [B, Hkv, d], v [B, Hkv, d]) of one new position per row -> [B, H, d], what came before included."""


class Eagle3Layer(DecoderLayer):
    """A decoder layer that attends with [embedding ; hidden], each behind its norm."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__(c, 2 * c.hidden_size)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Eagle3Draft(Draft):
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
        self.layers = nn.ModuleList([Eagle3Layer(c)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    @property
    def layer(self) -> Eagle3Layer:
        """The one decoder layer."""
        return self.layers[0]  # type: ignore[return-value]

    def context(self, taps: torch.Tensor) -> torch.Tensor:
        """g [N, D] of taps [N, L*D]."""
        return self.fc(taps)

    def context_kv(
        self, context: torch.Tensor, next_tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, Hkv, d] of pairs (g [N, D], token after it int64[N]) at absolute positions int64[N]."""
        return self.layer.self_attn.keys_values(self.joined(context, next_tokens)[0], *self.rope(positions))

    def advance(
        self, g: torch.Tensor, next_tokens: torch.Tensor, positions: torch.Tensor, attend: AttendOne
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One position of every row.

        Args:
            g: [B, D], the pairs' hidden state. next_tokens, positions: int64[B].
        Returns:
            (g of the next position [B, D], hidden state [B, D] that logits are made of).
        """
        layer = self.layer
        x, normed = self.joined(g, next_tokens)
        cos, sin = self.rope(positions)
        k, v = layer.self_attn.keys_values(x, cos, sin)
        mixed = attend(layer.self_attn.queries(x, cos, sin), k, v)
        out = layer.finish(normed if self.config.norm_before_residual else g, mixed)
        return out, self.norm(out)

    def joined(self, g: torch.Tensor, next_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.layer.hidden_norm(g)
        embedded = self.layer.input_layernorm(self.embedding(next_tokens).to(g.dtype))
        return torch.cat((embedded, normed), dim=-1), normed
