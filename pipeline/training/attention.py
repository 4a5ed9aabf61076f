"""Attention of a step's blocks over packed sequences: a block sees its own sequence's context strictly before its
anchor, less than a layer's sliding window away, and all of itself (of an unrolled block: its own earlier steps).

On CUDA one FlexAttention call takes all sequences at once under a block mask; elsewhere one sequence at a time is
exact at the cost of context + block. Nothing of either is as large as all blocks times all keys.

Letters: S sequence length, A anchors of a sequence, K slots of a block, N = sum over sequences of A * K (of unrolled
blocks, which have one slot at a time, of A), M = N + sum of S, H query heads, Hkv KV heads, G query heads of a KV head,
d head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

Attention = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], int], Tensor]
"""(q [N, H, d], k and v [N, Hkv, d] of the slots, (k, v) [sum S, Hkv, d] of the context, window) -> [N, H, d]."""
Unrolled = Callable[[Tensor, tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]], Tensor]
"""(q [N, H, d] of one step of every block, (k, v) [sum S, Hkv, d] of the context, (k, v) [N, Hkv, d] of each earlier
step) -> [N, H, d]."""
_TILE = 128  # FlexAttention's kernels take multiples of it


def packed_attention(lengths: list[int], anchors: list[Tensor], block: int, windows: Iterable[int]) -> Attention:
    """The attention of a step, by the device of its anchors.

    Args:
        lengths: S per sequence. anchors: int64[A] per sequence, 1 or more. block: K.
        windows: sliding windows that layers ask for (0: none), each above `block`.
    """
    if anchors[0].device.type == "cuda":
        tables = {w: flex_mask(lengths, anchors, block, w) for w in set(windows)}
        attend = _compiled()
        return lambda q, k, v, context, window: flex_block_attention(q, k, v, context, tables[window], attend)
    counts = [len(a) for a in anchors]
    masks = {w: [context_mask(a, n, block, w) for a, n in zip(anchors, lengths, strict=True)] for w in set(windows)}
    return lambda q, k, v, context, window: block_attention(q, k, v, context, lengths, counts, masks[window], block)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Uncompiled it would hold all scores. Sizes are dynamic: every step has others.
    return torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]


def flex_mask(lengths: list[int], anchors: list[Tensor], block: int, window: int, tile: int = _TILE) -> BlockMask:
    """FlexAttention's mask of [N] slots over [M] keys: the context of all sequences, then the slots.

    Its table of tiles comes from the blocks' ranges of keys, as evaluating the mask would take N * M entries.

    Args:
        window: 0: none. tile: slots, and keys, of a tile of the table.
    """
    device = anchors[0].device
    context, blocks = sum(lengths), sum(len(a) for a in anchors)
    slots = blocks * block
    counts = torch.tensor([len(a) for a in anchors], device=device)
    starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0).repeat_interleave(counts, output_size=blocks)
    # Per slot two ranges of keys: of its context and of its own block.
    index = torch.arange(slots, device=device)
    end = (starts + torch.cat(anchors)).repeat_interleave(block)
    first = starts.repeat_interleave(block)
    if window:
        first = torch.maximum(first, end + index % block - window + 1)
    own = context + index // block * block
    own_end = own + block  # a tensor: a captured number would be a symbol of the compiled kernel's

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        far = (key >= first[query]) & (key < end[query])
        return far | ((key >= own[query]) & (key < own_end[query]))

    return _from_ranges(((first, end), (own, own_end)), seen, context + slots, tile)


def flex_prefix_mask(lengths: list[int], anchors: list[Tensor], tile: int = _TILE) -> BlockMask:
    """FlexAttention's mask of one query per block [N] over the context of all sequences [sum S]."""
    device = anchors[0].device
    counts = torch.tensor([len(a) for a in anchors], device=device)
    starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
    first = starts.repeat_interleave(counts, output_size=sum(len(a) for a in anchors))
    end = first + torch.cat(anchors)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < end[query])

    return _from_ranges(((first, end),), seen, sum(lengths), tile)


def _from_ranges(
    ranges: tuple[tuple[Tensor, Tensor], ...], seen: Callable[..., Tensor], keys: int, tile: int
) -> BlockMask:
    """The mask of queries that see, each, ranges of keys (from, to) int64[queries], as `seen` has it entry by entry."""
    device, slots = ranges[0][0].device, len(ranges[0][0])
    index = torch.arange(slots, device=device)
    rows, columns = -(-slots // tile), -(-keys // tile)
    column = torch.arange(columns, device=device)
    table = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    for low, high in ranges:
        touched = (column >= low[:, None] // tile) & (column * tile < high[:, None]) & (low < high)[:, None]
        table.index_add_(0, index // tile, touched.int())
    used = (table > 0).int()
    order = used.argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        used.sum(-1, dtype=torch.int32)[None, None],
        order[None, None],
        BLOCK_SIZE=tile,
        mask_mod=seen,
        seq_lengths=(slots, keys),
    )


def flex_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor],
    mask: BlockMask,
    attend: Callable[..., Tensor] = flex_attention,
) -> Tensor:
    """`block_attention` by FlexAttention, all sequences in one call.

    Outputs and gradients are verified uncompiled on CPU, and the compiled forward with its table of tiles there (torch
    2.13 compiles no backward for CPU); no GPU has run it yet.

    Args:
        q, k, v, context: as `block_attention`. mask: `flex_mask`'s. attend: `flex_attention`, compiled on CUDA.
    Returns:
        [N, H, d].
    """
    # One dtype, the values': under autocast a norm may leave queries and keys in another, which the kernels refuse.
    dtype = v.dtype
    keys, values = (
        torch.cat((far.to(dtype), near.to(dtype))).transpose(0, 1)[None]
        for far, near in zip(context, (k, v), strict=True)
    )
    out = attend(q.to(dtype).transpose(0, 1)[None], keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def unrolled_attention(lengths: list[int], anchors: list[Tensor]) -> Unrolled:
    """The attention of blocks that are unrolled step by step, by the device of their anchors.

    Args:
        lengths: S per sequence. anchors: int64[A] per sequence, how many of its positions a block sees, 1 or more.
    """
    if anchors[0].device.type == "cuda":
        mask, attend = flex_prefix_mask(lengths, anchors), _compiled()
        return lambda q, context, own: flex_step_attention(q, context, own, mask, attend)
    counts = [len(a) for a in anchors]
    masks = [context_mask(a, n, 1, 0) for a, n in zip(anchors, lengths, strict=True)]
    return lambda q, context, own: step_attention(q, context, own, lengths, counts, masks)


def flex_step_attention(
    q: Tensor,
    context: tuple[Tensor, Tensor],
    own: list[tuple[Tensor, Tensor]],
    mask: BlockMask,
    attend: Callable[..., Any] = flex_attention,
) -> Tensor:
    """`step_attention` by FlexAttention over the context, joined with the few earlier steps by sums of exponentials.

    The context's keys are the same tensors at every step, so they are kept once for all. Outputs and gradients are
    verified uncompiled on CPU (torch 2.13 compiles no log-sum-exp there); no GPU has run it yet.

    Args:
        mask: `flex_prefix_mask`'s. attend: `flex_attention`, compiled on CUDA.
    """
    keys, values = context
    (heads, dim), kv_heads, dtype = q.shape[1:], keys.shape[1], values.dtype
    far, aux = attend(
        q.to(dtype).transpose(0, 1)[None],
        keys.to(dtype).transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        block_mask=mask,
        enable_gqa=heads != kv_heads,
        return_aux=AuxRequest(lse=True),
    )
    out = far[0].transpose(0, 1)
    if not own:
        return out
    grid = (q * dim**-0.5).view(-1, kv_heads, heads // kv_heads, dim)
    near = torch.stack([torch.einsum("nhgd,nhd->nhg", grid, k) for k, _ in own], -1).float()
    mass = aux.lse[0].transpose(0, 1).view(near.shape[:-1])
    total = torch.logaddexp(mass, near.logsumexp(-1))
    out = out.view(grid.shape) * (mass - total).exp()[..., None]
    for i, (_, v) in enumerate(own):
        out = out + (near[..., i] - total).exp()[..., None] * v[:, :, None]
    return out.view(q.shape).to(dtype)


def step_attention(
    q: Tensor,
    context: tuple[Tensor, Tensor],
    own: list[tuple[Tensor, Tensor]],
    lengths: list[int],
    counts: list[int],
    masks: list[Tensor],
) -> Tensor:
    """One softmax over a block's context and its own earlier steps.

    Args:
        q: [N, H, d]. context: (k, v) [sum S, Hkv, d]. own: (k, v) [N, Hkv, d] of each earlier step.
        lengths, counts: S and A per sequence. masks: additive [A, S] per sequence.
    Returns:
        [N, H, d].
    """
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


def context_mask(anchors: Tensor, length: int, block: int, window: int) -> Tensor:
    """Additive float[A*K, S]: a slot sees positions strictly before its block's anchor, and less than `window` before
    its own (0: any)."""
    device = anchors.device
    at = torch.arange(length, device=device)
    hidden = (at >= anchors[:, None]).repeat_interleave(block, 0)
    if window:
        hidden |= at <= (anchors[:, None] + torch.arange(block, device=device)).flatten()[:, None] - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor],
    lengths: list[int],
    counts: list[int],
    masks: list[Tensor],
    block: int,
) -> Tensor:
    """Attention of blocks over context + own block, exact, without a mask over all blocks of all sequences.

    One softmax spans two score tensors: blocks x context of the same sequence, and block x itself.

    Args:
        q: [N, H, d]; k, v: [N, Hkv, d] of the block slots; context: (k, v) [sum S, Hkv, d].
        lengths, counts: S and A per sequence. masks: additive [A*K, S] per sequence.
    Returns:
        [N, H, d].
    """
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    scale = dim**-0.5
    outputs = []
    slot, position = 0, 0
    for length, count, mask in zip(lengths, counts, masks, strict=True):
        here = slice(slot, slot + count * block)
        there = slice(position, position + length)
        slot, position = here.stop, there.stop
        # [Hkv, G, A*K, d]
        qs = (q[here] * scale).view(count * block, kv_heads, groups, dim).permute(1, 2, 0, 3)
        kc = context[0][there].transpose(0, 1)
        vc = context[1][there].transpose(0, 1)
        kb = k[here].view(count, block, kv_heads, dim).permute(2, 0, 1, 3)
        vb = v[here].view(count, block, kv_heads, dim).permute(2, 0, 1, 3)
        far = (qs.flatten(1, 2) @ kc.transpose(1, 2)).view(kv_heads, groups, count * block, length) + mask
        grid = qs.reshape(kv_heads, groups, count, block, dim)
        near = torch.einsum("hgakd,hajd->hgakj", grid, kb).reshape(kv_heads, groups, count * block, block)
        weights = torch.cat((far.float(), near.float()), dim=-1).softmax(-1).to(v.dtype)
        out = weights[..., :length].reshape(kv_heads, -1, length) @ vc
        own = weights[..., length:].reshape(kv_heads, groups, count, block, block)
        own = torch.einsum("hgakj,hajd->hgakd", own, vb).reshape(kv_heads, -1, dim)
        out = (out + own).view(kv_heads, groups, count * block, dim)
        outputs.append(out.permute(2, 0, 1, 3).reshape(count * block, heads, dim))
    return torch.cat(outputs)
