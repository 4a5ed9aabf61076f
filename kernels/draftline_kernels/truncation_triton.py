"""`truncation` in Triton: where the kept set of a row with min-p, top-k or top-p ends.

`select`, grid (rows), is launched by `verify_triton` and `markov_block_triton` behind `sampling_triton.stats`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling_triton import finite, overridden, row_total, scaled

WARPS = {"select": 16}
"""Of the kernel's launch, wherever it is launched, and in the compile test."""


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
def _search(
    row,
    peaks,
    width,
    blocks,
    temperature,
    entries,
    bounds,
    values,
    peak,
    low,
    high,
    limit,
    COUNT: tl.constexpr,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
):
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
                x = scaled(row, column, block, width, temperature, entries, bounds, values, OVERRIDES)
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
def _around(
    row,
    peaks,
    width,
    blocks,
    temperature,
    entries,
    bounds,
    values,
    peak,
    key,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Mass above a key, relative to exp(peak), and how many entries have it."""
    above = tl.full((), 0.0, tl.float32)
    equal = tl.full((), 0, tl.int32)
    lane = tl.arange(0, SPAN)
    for block in range(0, blocks):
        if order(tl.load(peaks + block)) >= key:
            column = block * SPAN + lane
            x = scaled(row, column, block, width, temperature, entries, bounds, values, OVERRIDES)
            own = order(x)
            above += tl.sum(tl.where(own > key, tl.exp(x - peak), 0.0), 0)
            equal += tl.sum(((own == key) & (column < width)).to(tl.int32), 0)
    return above, equal


@triton.jit
def select_row(
    row,
    peaks,
    sums,
    width,
    blocks,
    temperature,
    entries,
    bounds,
    values,
    k,
    p,
    floor,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
):
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
        last = _search(
            row,
            peaks,
            width,
            blocks,
            temperature,
            entries,
            bounds,
            values,
            peak,
            bottom,
            high,
            k.to(tl.float32),
            True,
            OVERRIDES,
            SPAN,
        )
        key = tl.maximum(key, last)
    if p < 1:
        if limited | (floor > float("-inf")):
            least = key.to(tl.int32)
            above, equal = _around(
                row, peaks, width, blocks, temperature, entries, bounds, values, peak, least, OVERRIDES, SPAN
            )
            total = above + equal * tl.exp(_value(least) - peak)
            low = key - 1
        key = _search(
            row,
            peaks,
            width,
            blocks,
            temperature,
            entries,
            bounds,
            values,
            peak,
            low,
            high,
            p * total,
            False,
            OVERRIDES,
            SPAN,
        )
    edge_key = key.to(tl.int32)
    edge = _value(edge_key)
    above, equal = _around(
        row, peaks, width, blocks, temperature, entries, bounds, values, peak, edge_key, OVERRIDES, SPAN
    )
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
            x = scaled(row, column, block, width, temperature, entries, bounds, values, OVERRIDES)
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
    lines,
    entries,
    bounds,
    starts,
    values,
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
    OVERRIDES: tl.constexpr,
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
        own_entries, own_bounds, own_values = overridden(
            owners, lines, entries, bounds, starts, values, row, width, blocks, OVERRIDES
        )
        edge, last_tie = select_row(
            logits + row * stride,
            peaks + row * blocks,
            sums + row * blocks,
            width,
            blocks,
            temperature,
            own_entries,
            own_bounds,
            own_values,
            k,
            p,
            floor,
            OVERRIDES,
            SPAN,
            PADDED,
        )
    tl.store(edges + row, edge)
    tl.store(last_ties + row, last_tie)
