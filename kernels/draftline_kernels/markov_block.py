"""The sequential head over a whole block: each slot's logits take a bias from the token drawn before it.

    logits_k = base_k + code_k W2^T,  code_k a function of x_{k-1} (DSpark, arXiv 2607.05147, eq. 5),  x_k drawn from it

The draws are `sampling.draw`'s, so that a block drawn on a GPU is the block drawn on a CPU. This module holds the
definition and the torch reference; on CUDA the work is done by `markov_block_triton`, which reads W2 once per slot for
the whole batch and writes logits only where somebody needs them.

Letters: B requests, K slots, r Markov rank, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import Sampling, draw, proposal_stream
from .truncation import largest, transform

Code = Callable[[int, Tensor], Tensor]
"""The Markov head: (slot k, previous int64[B] target tokens) -> code [B, r]. Called once per slot, in order."""


@dataclass(frozen=True)
class Block:
    """A drawn block.

    Attributes:
        tokens: int64[B, K] target ids. seen: int64[B, K], the token before each slot (the anchor's first).
        logits: float32[B, K, Vd] of the distributions drawn from, after `transform`: what `verify` takes as
            `draft_logits` under the ratio rule. None where they were not asked for. Rows of greedy requests, which
            verification does not read, are undefined.
    """

    tokens: Tensor
    seen: Tensor
    logits: Tensor | None


def _check(
    base: Tensor,
    w2: Tensor | None,
    anchor_tokens: Tensor,
    anchors: Tensor,
    sampling: Sampling,
    d2t: Tensor | None,
    vocabulary: int,
) -> None:
    """Raises ValueError, naming the argument, unless shapes, dtypes and devices fit each other."""
    if base.dim() != 3 or not base.is_floating_point() or 0 in base.shape[1:]:
        raise ValueError(f"base is {base.dtype} {list(base.shape)}; expected float [B, K > 0, Vd > 0]")
    batch, _, width = base.shape
    if w2 is not None and (w2.dim() != 2 or w2.shape[0] != width or w2.device != base.device):
        raise ValueError(f"w2 is {list(w2.shape)} on {w2.device}; expected [Vd, r] with Vd {width} on {base.device}")
    for name, value in (("anchor_tokens", anchor_tokens), ("anchors", anchors)):
        if value.shape != (batch,) or value.dtype != torch.int64 or value.device != base.device:
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)} on {value.device}; expected int64 [{batch}] on "
                f"{base.device}"
            )
    if len(sampling) != batch:
        raise ValueError(f"sampling is for {len(sampling)} requests; base is for {batch}")
    if d2t is None and vocabulary != width:
        raise ValueError(f"base has {width} columns, the target's vocabulary is {vocabulary}: give d2t")
    if d2t is not None and (d2t.shape != (width,) or d2t.dtype != torch.int64 or d2t.device != base.device):
        raise ValueError(
            f"d2t is {d2t.dtype} {list(d2t.shape)} on {d2t.device}; expected int64 [Vd] = [{width}] on {base.device}"
        )
    if base.device.type == "cuda" and (base.stride(2) != 1 or (w2 is not None and w2.stride(1) != 1)):
        raise ValueError("base and w2 must have dense rows on CUDA (contiguous())")


def markov_block(
    base: Tensor,
    code: Code | None,
    w2: Tensor | None,
    anchor_tokens: Tensor,
    anchors: Tensor,
    sampling: Sampling,
    *,
    vocabulary: int,
    d2t: Tensor | None = None,
    rule: str = "coupled",
    logits: bool = False,
    first: int = 0,
) -> Block:
    """Draws a block of every request, slot by slot.

    Args:
        base: [B, K, Vd] logits of the slots without the Markov bias, after any softcap.
        code, w2: the Markov head's code of a slot and its matrix [Vd, r]; None, None: no head.
        anchor_tokens: int64[B], the tokens before slot 0. anchors: int64[B], absolute positions of the round's anchors;
            slot k's token is at anchors + 1 + first + k.
        sampling: parameters of the B requests; greedy rows take the largest logit, lowest id on ties.
        vocabulary: V. d2t: int64[Vd] ascending target ids of the columns; None when they are the target's.
        rule: the verification rule that the block will meet ("coupled" or "ratio"); it decides the noise.
        logits: keep the logits drawn from (the ratio rule needs them).
        first: slots of the round that were drawn before these.

    Raises:
        ValueError: shapes, dtypes, devices or the rule do not fit; the message names the argument.
    """
    if (code is None) != (w2 is None):
        raise ValueError("code and w2 belong together: give both or neither")
    _check(base, w2, anchor_tokens, anchors, sampling, d2t, vocabulary)
    stream = proposal_stream(rule)
    own = anchors if rule == "ratio" else None
    if base.device.type == "cuda":
        from . import markov_block_triton

        return markov_block_triton.markov_block(
            base, code, w2, anchor_tokens, anchors + first, sampling, vocabulary, d2t, stream, own, logits
        )
    return reference(base, code, w2, anchor_tokens, anchors + first, sampling, d2t, stream, own, logits)


def reference(
    base: Tensor,
    code: Code | None,
    w2: Tensor | None,
    anchor_tokens: Tensor,
    anchors: Tensor,
    sampling: Sampling,
    d2t: Tensor | None,
    stream: str,
    own_anchor: Tensor | None,
    logits: bool,
) -> Block:
    """`markov_block` in torch, on any device, arguments unchecked; `own_anchor` keys the noise by the round too."""
    previous = anchor_tokens
    tokens, seen, kept = [], [], []
    for k in range(base.shape[1]):
        seen.append(previous)
        z = base[:, k].float()
        if code is not None and w2 is not None:
            z = z + F.linear(code(k, previous).to(w2.dtype), w2).float()
        if sampling.greedy:
            best, _ = largest(z)
            previous = best if d2t is None else d2t[best]
        else:
            z = transform(z, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            at = anchors + 1 + k
            previous = draw(
                z, sampling.seed, at, d2t, temperature=sampling.temperature, stream=stream, anchor=own_anchor
            )
        tokens.append(previous)
        if logits:
            kept.append(z)
    return Block(torch.stack(tokens, 1), torch.stack(seen, 1), torch.stack(kept, 1) if logits else None)
