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
import torch.nn.functional as F
from torch import nn

from pipeline.drafts.config import DraftConfig
from pipeline.drafts.heads import MARKOV_HEADS, ConfidenceHead

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [T, H, d], k [T, Hkv, d], v [T, Hkv, d]) of the block slots -> [T, H, d], context included."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections shared by context and block; the attention itself is the caller's `attend`."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.shape_q, self.shape_kv = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _rotate(self.q_norm(self.q_proj(x).unflatten(-1, self.shape_q)), cos, sin)

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.k_norm(self.k_proj(x).unflatten(-1, self.shape_kv))
        return _rotate(k, cos, sin), self.v_proj(x).unflatten(-1, self.shape_kv)


class MLP(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DSparkDraft(nn.Module):
    """The draft's module.

    Args:
        config: resolved (no zeros left).
        embed: float[V, D], the target's embedding. lm_head: float[V, D], its output rows. Both are kept as
            references outside the state dict (lm_head only its rows in the draft vocabulary).
        d2t: int64[Vd], ascending target ids of the draft vocabulary.
        embed_scale, logit_softcap: the target family's.
    Attributes:
        temperatures: float32[G], calibration of the confidence logits (ones until fitted).
    """

    d2t: torch.Tensor
    temperatures: torch.Tensor
    embed: torch.Tensor
    lm_rows: torch.Tensor
    inv_freq: torch.Tensor

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
        super().__init__()
        c = self.config = config
        self.embed_scale, self.logit_softcap = embed_scale, logit_softcap
        self.fc = nn.Linear(len(c.target_layer_ids) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.markov_head = None
        if c.has_markov:
            head = MARKOV_HEADS[c.markov_head_type]
            self.markov_head = head(embed.shape[0], d2t.shape[0], c.markov_rank, c.hidden_size)
        size = c.hidden_size + (c.markov_rank if c.has_markov and c.confidence_head_with_markov else 0)
        self.confidence_head = ConfidenceHead(size) if c.enable_confidence_head else None
        self.register_buffer("d2t", d2t.clone())
        self.register_buffer("temperatures", torch.ones(c.tokens_per_block))
        self.register_buffer("embed", embed.detach(), persistent=False)
        full = d2t.shape[0] == lm_head.shape[0]
        self.register_buffer("lm_rows", lm_head.detach() if full else lm_head.detach()[d2t], persistent=False)
        steps = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        self.register_buffer("inv_freq", c.rope_theta**-steps, persistent=False)

    @property
    def decoder_layers(self) -> list[Layer]:
        """`layers` by their type."""
        return list(self.layers)  # type: ignore[arg-type]

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, d] of int64 positions [N]."""
        angles = positions[:, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def context(self, taps: torch.Tensor) -> torch.Tensor:
        """H_ctx [N, D] = RMSNorm(W_c taps) of taps [N, L*D]."""
        return self.hidden_norm(self.fc(taps))

    def context_kv(self, context: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per draft layer: keys and values [N, Hkv, d] of context [N, D] at absolute positions [N]."""
        cos, sin = self.rope(positions)
        return [layer.self_attn.keys_values(context, cos, sin) for layer in self.decoder_layers]

    def block_input(self, anchor_tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [A*K, D] of blocks that start with anchor_tokens [A]."""
        mask = self.embed[self.config.mask_token_id].expand(
            anchor_tokens.shape[0], self.config.block_size - 1, self.config.hidden_size
        )
        x = torch.cat((self.embed[anchor_tokens][:, None], mask), dim=1).flatten(0, 1)
        return x * self.embed_scale if self.embed_scale != 1.0 else x

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
            mixed = attend(i, layer.self_attn.queries(h, cos, sin), k, v)
            x = x + layer.self_attn.o_proj(mixed.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        if not self.config.sample_from_anchor:
            x = x.unflatten(0, (-1, self.config.block_size))[:, 1:].flatten(0, 1)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Backbone logits [.., Vd] of hidden [.., D], without the Markov bias."""
        return self.cap(F.linear(hidden, self.lm_rows))

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Applies the target family's softcap, if it has one."""
        return logits if not self.logit_softcap else torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def markov_step(
        self, hidden: torch.Tensor, previous: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        """Bias [.., Vd] of slots with hidden [.., D] after target tokens previous [..] (0.0 without a Markov head), and
        the head's state for the next slot."""
        if self.markov_head is None:
            return 0.0, None
        code, state = self.markov_head.step(hidden, previous, state)
        return self.markov_head.markov_w2(code), state

    def confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        """Confidence logits [..] of slots with hidden [.., D] after tokens previous [..]; None without the head."""
        if self.confidence_head is None:
            return None
        x = hidden
        if self.config.has_markov and self.config.confidence_head_with_markov and self.markov_head is not None:
            x = torch.cat((hidden, self.markov_head.markov_w1(previous).to(hidden.dtype)), dim=-1)
        return self.confidence_head.proj(x).squeeze(-1)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint: everything but what is borrowed."""
        return {name: t.detach() for name, t in self.state_dict().items()}


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
