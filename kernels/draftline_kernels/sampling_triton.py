"""`sampling` in Triton: block statistics of logits, kept sets of min-p, top-k and top-p, and the hierarchical draw.

Device functions for the kernels of `verify_triton` and `markov_block_triton`, and two kernels that both launch:
`stats` reads every logit of its rows once; `select` finds where the kept set of a truncated row ends. The draws are
those of `sampling.draw_mass`: the same blocks of 4096 target ids, the same noise; only the rounding of sums may differ.

Blocks: peaks float32 [N, C] are the blocks' maxima (NaN where a block holds one), sums float32 [N, C] their sum-exps
relative to those, places int32 [N, C] the ids of the maxima, lowest on ties. SPAN is the block's width, PADDED the next
power of two above C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise_triton import gumbel
from .sampling import BLOCK

WARPS = {"stats": 8, "select": 16}
"""Of each kernel's launch, wherever it is launched, and in the compile test."""


@triton.jit
def scaled(row, column, width, temperature):
    """float32 logits of a row at `column` after temperature, -inf beyond the row; rounded as torch's division is."""
    x = tl.load(row + column, mask=column < width, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(x))


@triton.jit
def order(x):
    """int32 keys in the order of float32 values; -0 counts as 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 whose `order` is `key`, int32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_kept(x, column, edge, last_tie):
    """Whether entries are in the kept set of their row: above the edge, or one of its first ties."""
    return (x > edge) | ((x == edge) & (column <= last_tie))


@triton.jit
def row_total(peaks, sums, blocks, PADDED: tl.constexpr):
    """Of one row's block statistics: its maximum (NaN if any is), block masses relative to it, and their sum."""
    lane = tl.arange(0, PADDED)
    highest = tl.load(peaks + lane, mask=lane < blocks, other=float("-inf"))
    broken = tl.max((highest != highest).to(tl.int32), 0) > 0
    peak = tl.where(broken, float("nan"), tl.max(highest, 0))
    weight = tl.where(highest > float("-inf"), tl.exp(highest - peak), 0.0)
    mass = tl.load(sums + lane, mask=lane < blocks, other=0.0) * weight
    return peak, mass, tl.sum(mass, 0)


@triton.jit
def finite(x):
    """Neither NaN nor infinite."""
    return (x == x) & (tl.abs(x) != float("inf"))


@triton.jit
def stats(
    logits,
    stride,
    temperatures,
    peaks,
    places,
    sums,
    width,
    blocks,
    GREEDY: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x width passes 2^31 at 14,000 rows
    block = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature < 0:  # nobody will ask
        return
    column = block * SPAN + tl.arange(0, SPAN)
    x = scaled(logits + row * stride, column, width, temperature)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    peak, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * blocks + block
    tl.store(peaks + at, tl.where(broken, float("nan"), peak))
    tl.store(places + at, block * SPAN + place)
    if not GREEDY:
        tl.store(sums + at, tl.where(peak > float("-inf"), tl.sum(tl.exp(x - peak), 0), 0.0))


@triton.jit
def _search(row, peaks, width, blocks, temperature, peak, low, high, limit, COUNT: tl.constexpr, SPAN: tl.constexpr):
    """The smallest key e in (low, high] with less than `limit` above it: mass relative to exp(peak), or entries.

    Eight thresholds per sweep divide the bracket by nine; 64-bit, as its width may pass 2^31.
    """
    way = tl.arange(0, 8)
    lane = tl.arange(0, SPAN)
    while high - low > 1:
        threshold = low + (high - low) * (way + 1) // 9
        above = tl.zeros((8,), tl.float32)
        for block in range(0, blocks):
            if order(tl.load(peaks + block)).to(tl.int64) > low:
                column = block * SPAN + lane
                x = scaled(row, column, width, temperature)
                weight = tl.where(column < width, 1.0, 0.0)
                if not COUNT:
                    weight *= tl.exp(x - peak)
                higher = order(x)[:, None] > threshold.to(tl.int32)[None, :]
                above += tl.sum(tl.where(higher, weight[:, None], 0.0), 0)
        heavy = above >= limit
        low = tl.maximum(low, tl.max(tl.where(heavy, threshold, low), 0))
        high = tl.minimum(high, tl.min(tl.where(heavy, high, threshold), 0))
    return high


@triton.jit
def _around(row, peaks, width, blocks, temperature, peak, key, SPAN: tl.constexpr):
    """Mass above a key, relative to exp(peak), and how many entries have it."""
    above = tl.full((), 0.0, tl.float32)
    equal = tl.full((), 0, tl.int32)
    lane = tl.arange(0, SPAN)
    for block in range(0, blocks):
        if order(tl.load(peaks + block)) >= key:
            column = block * SPAN + lane
            x = scaled(row, column, width, temperature)
            own = order(x)
            above += tl.sum(tl.where(own > key, tl.exp(x - peak), 0.0), 0)
            equal += tl.sum(((own == key) & (column < width)).to(tl.int32), 0)
    return above, equal


@triton.jit
def select_row(row, peaks, sums, width, blocks, temperature, k, p, floor, SPAN: tl.constexpr, PADDED: tl.constexpr):
    """The kept set of a row (min-p, of which `floor` is the logarithm, then top-k, then top-p, each on what is left):
    (edge, last_tie) for `is_kept`. Block sums are rewritten to those of the kept entries, which are relative to the
    block maxima as before."""
    peak, _, total = row_total(peaks, sums, blocks, PADDED)
    limited = (k > 0) & (k < width)
    high = order(peak).to(tl.int64)
    # In exact arithmetic nothing under (1 - p) / V can be part of the first p; half of it, so that rounding can't lose
    # an entry at the edge.
    low = order(peak + tl.log(total) + tl.log((1.0 - tl.minimum(p, 0.9999999)) / (2.0 * width))).to(tl.int64) - 1
    bottom = tl.full((), -2139095042, tl.int64)  # below -inf
    # Both leave an upper set: the smaller one, whichever comes first. It may end between two entries.
    key = order(peak + floor).to(tl.int64)
    if limited:
        last = _search(row, peaks, width, blocks, temperature, peak, bottom, high, k.to(tl.float32), True, SPAN)
        key = tl.maximum(key, last)
    if p < 1:
        if limited | (floor > float("-inf")):
            above, equal = _around(row, peaks, width, blocks, temperature, peak, key.to(tl.int32), SPAN)
            total = above + equal * tl.exp(_value(key.to(tl.int32)) - peak)
            low = key - 1
        key = _search(row, peaks, width, blocks, temperature, peak, low, high, p * total, False, SPAN)
    edge_key = key.to(tl.int32)
    edge = _value(edge_key)
    above, equal = _around(row, peaks, width, blocks, temperature, peak, edge_key, SPAN)
    ties = equal
    if p < 1:
        # Ties stay, lowest id first, while the mass ranked above them is under p; one entry always does.
        wanted = tl.ceil((p * total - above) / tl.exp(edge - peak))
        ties = tl.minimum(tl.maximum(wanted, 1.0), equal.to(tl.float32)).to(tl.int32)
    seen = tl.full((), 0, tl.int32)
    last_tie = tl.full((), -1, tl.int32)
    lane = tl.arange(0, SPAN)
    for block in range(0, blocks):
        own_peak = tl.load(peaks + block)
        mass = tl.full((), 0.0, tl.float32)
        if order(own_peak) >= edge_key:
            column = block * SPAN + lane
            x = scaled(row, column, width, temperature)
            own = order(x)
            tied = ((own == edge_key) & (column < width)).to(tl.int32)
            first = (tied > 0) & (seen + tl.cumsum(tied, 0) <= ties)
            mass = tl.sum(tl.where((own > edge_key) | first, tl.exp(x - own_peak), 0.0), 0)
            last_tie = tl.maximum(last_tie, tl.max(tl.where(first, column, -1), 0))
            seen += tl.sum(tied, 0)
        tl.store(sums + block, tl.where(own_peak > float("-inf"), mass, 0.0))
    return edge, last_tie


@triton.jit
def select(
    logits,
    stride,
    owners,
    temperatures,
    top_k,
    top_p,
    floors,
    peaks,
    sums,
    edges,
    last_ties,
    width,
    blocks,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    owner = tl.load(owners + row)
    k = tl.load(top_k + owner)
    p = tl.load(top_p + owner)
    floor = tl.load(floors + owner)
    edge = tl.full((), float("-inf"), tl.float32)
    last_tie = tl.full((), 0, tl.int32) + width
    peak, _, _ = row_total(peaks + row * blocks, sums + row * blocks, blocks, PADDED)
    if (temperature > 0) & (((k > 0) & (k < width)) | (p < 1) | (floor > float("-inf"))) & finite(peak):
        edge, last_tie = select_row(
            logits + row * stride,
            peaks + row * blocks,
            sums + row * blocks,
            width,
            blocks,
            temperature,
            k,
            p,
            floor,
            SPAN,
            PADDED,
        )
    tl.store(edges + row, edge)
    tl.store(last_ties + row, last_tie)


@triton.jit
def pick_block(mass, blocks, stream, seed, position, PADDED: tl.constexpr):
    """A block by its mass; one block needs no noise."""
    lane = tl.arange(0, PADDED)
    score = tl.where(mass > 0, tl.log(mass), float("-inf")) + gumbel(stream, seed, position, lane)
    score = tl.where(lane < blocks, score, float("-inf"))
    return tl.argmax(score, 0, tie_break_left=True)


@triton.jit
def pick_token(mass, column, stream, seed, position):
    """A token of a block by its mass; `column` holds target token ids."""
    score = tl.where(mass > 0, tl.log(mass), float("-inf")) + gumbel(stream + 1, seed, position, column)
    best = tl.argmax(score, 0, tie_break_left=True)
    return tl.sum(tl.where(tl.arange(0, mass.shape[0]) == best, column, 0), 0)


def block_statistics(logits: Tensor, temperatures: Tensor, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """peaks, places and sums [N, C] of logits [N, V] (rows dense) at float32 [N] temperatures; rows below 0 are left
    out, what they hold is undefined."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    peaks = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    sums = torch.empty_like(peaks)
    stats[(rows, blocks)](
        logits,
        logits.stride(0),
        temperatures,
        peaks,
        places,
        sums,
        width,
        blocks,
        GREEDY=greedy,
        SPAN=BLOCK,
        num_warps=WARPS["stats"],
    )
    return peaks, places, sums
