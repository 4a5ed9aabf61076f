"""Eagle3's training-time test: the draft's own outputs as its inputs, as decoding will have them.

Step k of a block takes the text's true token a + k and the output of step k - 1 (step 0: the target's tap before the
anchor). It attends to the pairs of all real positions before the anchor and to its own block's earlier steps, exactly
what a decoding block sees (arXiv 2503.01840, section 3.2); blocks start at sampled anchors, as a block drafter's do.

Letters: S sequence length, A anchors of a sequence, N = sum of A over sequences, G steps, L taps, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.training.attention import unrolled_attention


def unrolled_hidden(draft: Eagle3Draft, tokens: list[Tensor], taps: list[Tensor], anchors: list[Tensor]) -> Tensor:
    """Hidden states [N * G, D] that logits are made of: slot k of a block at anchor a stands for token a + 1 + k.

    Args:
        tokens: int64[S] per sequence. taps: [S, L*D] per sequence. anchors: int64[A] per sequence, 1 or more each.
    """
    device = taps[0].device
    lengths = [len(t) - 1 for t in taps]  # the pair of the last position lacks its token
    g = draft.context(torch.cat([t[:-1] for t in taps]))
    keys, values = draft.context_kv(
        g,
        torch.cat([t[1:] for t in tokens]),
        torch.cat([torch.arange(n, device=device) for n in lengths]),
    )
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    state = g[torch.cat([a - 1 + start for a, start in zip(anchors, starts[:-1], strict=True)])]
    positions = torch.cat(anchors) - 1
    attention = unrolled_attention(lengths, anchors)
    own: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if step:  # the first step's pair is the last of the context
            own.append((k, v))
        return attention(q, (keys, values), own)

    out = []
    for step in range(draft.config.tokens_per_block):
        at = [(a + step).clamp(max=len(t) - 1) for a, t in zip(anchors, tokens, strict=True)]
        before = torch.cat([t[i] for t, i in zip(tokens, at, strict=True)])
        state, hidden = draft.advance(state, before, positions + step, attend)
        out.append(hidden)
    return torch.stack(out, 1).flatten(0, 1)
