"""Eagle3's training-time test: the draft's own outputs as its inputs, as decoding will have them.

Step k of a block takes the text's true token a + k and the output of step k - 1 (step 0: the target's tap before the
anchor). It attends to the pairs of all real positions before the anchor and to its own block's earlier steps, exactly
what a decoding block sees (arXiv 2503.01840, section 3.2); blocks start at sampled anchors, as a block drafter's do.

Letters: S sequence length, A anchors of a sequence, N = sum of A over sequences, G steps, D hidden, H query heads, Hkv
KV heads, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.drafts.eagle3 import Eagle3Draft


def unrolled_hidden(draft: Eagle3Draft, tokens: list[Tensor], taps: list[Tensor], anchors: list[Tensor]) -> Tensor:
    """Hidden states [N * G, D] that logits are made of: slot k of a block at anchor a stands for token a + 1 + k.

    Args:
        tokens: int64[S] per sequence. taps: [S, L*D] per sequence. anchors: int64[A] per sequence, 1 or more each.
    """
    device = taps[0].device
    lengths = [len(t) - 1 for t in taps]  # the pair of the last position lacks its token
    counts = [len(a) for a in anchors]
    g = draft.context(torch.cat([t[:-1] for t in taps]))
    keys, values = draft.context_kv(
        g,
        torch.cat([t[1:] for t in tokens]),
        torch.cat([torch.arange(n, device=device) for n in lengths]),
    )
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    state = g[torch.cat([a - 1 + start for a, start in zip(anchors, starts[:-1], strict=True)])]
    positions = torch.cat(anchors) - 1
    masks = [_before(a, n) for a, n in zip(anchors, lengths, strict=True)]
    own: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if step:  # the first step's pair is the last of the context
            own.append((k, v))
        return _attention(q, (keys, values), own, lengths, counts, masks)

    out = []
    for step in range(draft.config.tokens_per_block):
        at = [(a + step).clamp(max=len(t) - 1) for a, t in zip(anchors, tokens, strict=True)]
        before = torch.cat([t[i] for t, i in zip(tokens, at, strict=True)])
        state, hidden = draft.advance(state, before, positions + step, attend)
        out.append(hidden)
    return torch.stack(out, 1).flatten(0, 1)


def _before(anchors: Tensor, length: int) -> Tensor:
    """Additive float[A, S]: a block sees the pairs of positions before its anchor."""
    at = torch.arange(length, device=anchors.device)
    shape = (len(anchors), length)
    return torch.zeros(shape, device=anchors.device).masked_fill_(at >= anchors[:, None], float("-inf"))


def _attention(
    q: Tensor,
    context: tuple[Tensor, Tensor],
    own: list[tuple[Tensor, Tensor]],
    lengths: list[int],
    counts: list[int],
    masks: list[Tensor],
) -> Tensor:
    """One softmax over a block's context and its own earlier steps: q [N, H, d] -> [N, H, d]."""
    heads, dim = q.shape[1:]
    kv_heads = context[0].shape[1]
    groups = heads // kv_heads
    grid = (q * dim**-0.5).view(-1, kv_heads, groups, dim)
    near = torch.stack([torch.einsum("nhgd,nhd->nhg", grid, k) for k, _ in own], -1) if own else None
    outputs, row, position = [], 0, 0
    for length, count, mask in zip(lengths, counts, masks, strict=True):
        here, there = slice(row, row + count), slice(position, position + length)
        row, position = here.stop, there.stop
        kc, vc = (x[there].transpose(0, 1) for x in context)  # [Hkv, S, d]
        qs = grid[here].transpose(0, 1)  # [Hkv, A, G, d]
        scores = (qs.flatten(1, 2) @ kc.transpose(1, 2)).view(kv_heads, count, groups, length) + mask[:, None]
        scores = scores.float()
        if near is not None:
            scores = torch.cat((scores, near[here].transpose(0, 1).float()), dim=-1)
        weights = scores.softmax(-1).to(vc.dtype)
        out = (weights[..., :length].flatten(1, 2) @ vc).view(kv_heads, count, groups, dim)
        for i, (_, v) in enumerate(own):
            out = out + weights[..., length + i, None] * v[here].transpose(0, 1)[:, :, None]
        outputs.append(out.transpose(0, 1).reshape(count, heads, dim))
    return torch.cat(outputs)
