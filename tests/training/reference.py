"""Plain references in the open: dense masks, whole vocabularies, float64, one block at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.training.attention import packed_attention


def training_hidden(draft: DSparkDraft, tokens: list[Tensor], taps: list[Tensor], anchors: list[Tensor]) -> Tensor:
    """Hidden states [sum A * G, D] by the training forward: several sequences, several anchors each."""
    block = draft.config.block_size
    lengths = [len(t) for t in taps]
    kv = draft.context_kv(draft.context(torch.cat(taps)), torch.cat([torch.arange(n) for n in lengths]))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return training_attention(q, k, v, kv[layer], lengths, anchors, block, draft.config.window(layer))

    first = torch.cat([t[a] for t, a in zip(tokens, anchors, strict=True)])
    return draft.blocks(first, torch.cat(anchors), attend)


def training_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor],
    lengths: list[int],
    anchors: list[Tensor],
    block: int,
    window: int = 0,
) -> Tensor:
    """The training step's attention for given anchors per sequence: [N, H, d]."""
    return packed_attention(lengths, anchors, block, [window])(q, k, v, context, window)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor],
    lengths: list[int],
    anchors: list[Tensor],
    block: int,
) -> Tensor:
    """The same attention with one mask over everything, in float64: [N, H, d]."""
    q, k, v = q.double(), k.double(), v.double()
    keys, values = torch.cat((context[0].double(), k)), torch.cat((context[1].double(), v))
    total = sum(lengths)
    seen = torch.zeros(q.shape[0], total + k.shape[0], dtype=torch.bool)
    row, start = 0, 0
    for length, of_sequence in zip(lengths, anchors, strict=True):
        for anchor in of_sequence.tolist():
            seen[row : row + block, start : start + anchor] = True
            seen[row : row + block, total + row : total + row + block] = True
            row += block
        start += length
    groups = q.shape[1] // k.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, keys) / math.sqrt(q.shape[-1])
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)


def plain_eagle3(draft: Eagle3Draft, tokens: Tensor, taps: Tensor, anchor: int) -> Tensor:
    """Hidden states [G, D] of the block at `anchor`: the whole sequence of pairs run anew for every step."""
    layer, config = draft.layer, draft.config
    g = list(draft.fc(taps[:anchor]))
    out = []
    for step in range(config.block_size):
        n = anchor + step
        stream = torch.stack(g)
        after = tokens[torch.arange(1, n + 1).clamp(max=len(tokens) - 1)]
        normed = layer.hidden_norm(stream)
        x = torch.cat((layer.input_layernorm(draft.embed[after] * draft.embed_scale), normed), -1)
        cos, sin = draft.rope(torch.arange(n))
        q = layer.self_attn.queries(x, cos, sin)
        k, v = layer.self_attn.keys_values(x, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = (torch.einsum("hd,mhd->hm", q[-1], k) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = torch.einsum("hm,mhd->hd", weights, v).flatten()
        h = (normed if config.norm_before_residual else stream)[-1] + layer.self_attn.o_proj(mixed)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        g.append(h)
        out.append(draft.norm(h))
    return torch.stack(out)


def dense_loss(
    hidden: Tensor,
    markov: Tensor | None,
    w2: Tensor | None,
    lm_head: Tensor,
    d2t: Tensor,
    target_hidden: Tensor,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    l1_weight: Tensor,
    rkl_weight: Tensor,
    lk_weight: Tensor,
    hybrid_weight: Tensor,
    eta: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, acceptance [N]) with q and p both written out over the target's whole vocabulary (q is 0 outside)."""

    def cap(x: Tensor) -> Tensor:
        return softcap * torch.tanh(x / softcap) if softcap else x

    logits = cap(hidden @ lm_head[d2t].T)
    if markov is not None and w2 is not None:
        logits = logits + markov @ w2.T
    log_q = logits.log_softmax(-1)
    p = cap(target_hidden @ lm_head.T).softmax(-1)
    q = torch.zeros_like(p).index_copy(1, d2t, log_q.exp())
    l1 = (q - p).abs().sum(-1)
    inside = labels >= 0
    ce = -log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0] * inside
    inner = p[:, d2t]
    m = inner.sum(-1)
    kl = m * torch.nn.functional.kl_div(log_q, inner / m[:, None], reduction="none").sum(-1)
    rkl = (log_q.exp() * (log_q - inner.log())).sum(-1)
    acceptance = torch.minimum(q, p).sum(-1)
    share = torch.exp(-eta * acceptance.detach())
    hybrid = share * kl + (1 - share) * l1 / 2
    loss = (ce * ce_weight).sum() + (kl * kl_weight).sum() + (l1 * l1_weight).sum() + (rkl * rkl_weight).sum()
    loss = loss - (acceptance.log() * lk_weight).sum() + (hybrid * hybrid_weight).sum()
    return loss, acceptance.detach()
