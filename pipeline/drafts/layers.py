"""The decoder layers that drafts are built of: Llama's kind (Qwen3's with QK norm) and Gemma 4's.

Gemma 4's normalise what attention and MLP give back too, use GELU, attend with scale 1 to values that are normalised
(and may be the keys, before their own norm), rotate a part of a head, and scale their output by `layer_scalar`.

Letters: N positions, D hidden, H query heads, Hkv KV heads, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.drafts.config import DraftConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections of inputs [.., input_size] (D unless given); the attention itself is the caller's, with the usual
    scale d**-0.5: where a family has another, queries bring it along."""

    def __init__(self, c: DraftConfig, input_size: int = 0) -> None:
        super().__init__()
        size = input_size or c.hidden_size
        self.shape_q, self.shape_kv = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        self.gain = c.head_dim**0.5 if c.layer_family == "gemma4" else 1.0
        self.value_eps = c.rms_norm_eps if c.layer_family == "gemma4" else None
        self.q_proj = nn.Linear(size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(size, c.num_kv_heads * c.head_dim, bias=False)
        # None: a key, before its norm, is its value.
        self.v_proj: Any = None if c.values_are_keys else nn.Linear(size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, self.shape_q)), cos, sin)
        return q if self.gain == 1.0 else q * self.gain

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.k_proj(x).unflatten(-1, self.shape_kv)
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, self.shape_kv)
        if self.value_eps is not None:
            v = F.rms_norm(v, (v.shape[-1],), None, self.value_eps)
        return rotate(self.k_norm(k), cos, sin), v


class MLP(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.gelu = c.layer_family == "gemma4"
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A layer but for its attention, which is the caller's: what to attend with comes from `self_attn`, and `finish`
    takes what attention gave.

    Args:
        input_size: of what `self_attn` reads (D unless given).
    """

    layer_scalar: torch.Tensor

    def __init__(self, c: DraftConfig, input_size: int = 0) -> None:
        super().__init__()
        self.gemma = c.layer_family == "gemma4"
        self.self_attn = Attention(c, input_size)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if self.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def finish(self, residual: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output [N, D] from its residual stream [N, D] and what attention gave, [N, H, d]."""
        attended = self.self_attn.o_proj(mixed.flatten(-2))
        if not self.gemma:
            x = residual + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = residual + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
