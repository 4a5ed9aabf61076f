"""The ratio rule's second half in Triton: the token that follows a rejection, or the bonus token.

`residual`, grid (requests, blocks), sums what the rule draws from, block by block: max(p - q, 0) of the rejected row,
or p of the bonus row; `pick`, grid (requests), draws a block and then a token inside it. One target row and one draft
row are read per request, and one block of each again; neither p nor q is ever written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling import STREAMS
from .sampling_triton import is_kept, overridden, pick_block, pick_token, row_total, scaled

_RESIDUAL = tl.constexpr(STREAMS["residual"][0])
_BONUS = tl.constexpr(STREAMS["bonus"][0])


@triton.jit
def draft_probability(draft, peaks, sums, row, column, width, blocks, PADDED: tl.constexpr):
    """q of a draft row at `column` (any shape), 0 where it is negative; NaN in a row that is not finite."""
    peak, _, total = row_total(peaks + row * blocks, sums + row * blocks, blocks, PADDED)
    x = tl.load(draft + row * width + column, mask=column >= 0, other=float("-inf")).to(tl.float32)
    return tl.where(column >= 0, tl.exp(x - peak) / total, 0.0)


@triton.jit
def draft_column(t2d, token, D2T: tl.constexpr):
    """Columns of target ids in the draft's logits, -1 where the draft has none."""
    if D2T:
        return tl.load(t2d + token, mask=token >= 0, other=-1)
    else:
        return token


@triton.jit
def _correction(
    logits,
    stride,
    owners,
    lines,
    entries,
    bounds,
    starts,
    values,
    tokens,
    edges,
    last_ties,
    peaks,
    sums,
    draft,
    draft_peaks,
    draft_sums,
    t2d,
    row,
    request,
    at,
    rejected,
    block,
    temperature,
    slots,
    width,
    blocks,
    draft_width,
    draft_blocks,
    DRAFT: tl.constexpr,
    D2T: tl.constexpr,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    DRAFT_PADDED: tl.constexpr,
):
    """Of one block of a row: p, and the mass that the ratio rule draws from, p itself unless a token was rejected."""
    column = block * SPAN + tl.arange(0, SPAN)
    peak, _, total = row_total(peaks + row * blocks, sums + row * blocks, blocks, PADDED)
    own_entries, own_bounds, own_values = overridden(
        owners, lines, entries, bounds, starts, values, row, width, blocks, OVERRIDES
    )
    x = scaled(logits + row * stride, column, block, width, temperature, own_entries, own_bounds, own_values, OVERRIDES)
    p = tl.where(is_kept(x, column, tl.load(edges + row), tl.load(last_ties + row)), tl.exp(x - peak) / total, 0.0)
    mass = p
    if rejected:
        token = tl.load(tokens + request * slots + at)
        token = tl.where(token < width, token, -1)
        without = tl.where(column == token, 0.0, p)
        mass = without
        if DRAFT:
            row_q = request * slots + at
            own = draft_column(t2d, token, D2T)
            chance = draft_probability(
                draft, draft_peaks, draft_sums, row_q, own, draft_width, draft_blocks, DRAFT_PADDED
            )
            if chance > 0:
                ids = tl.where(column < width, column, -1)
                there = draft_column(t2d, ids, D2T)
                q = draft_probability(
                    draft, draft_peaks, draft_sums, row_q, there, draft_width, draft_blocks, DRAFT_PADDED
                )
                mass = tl.maximum(p - q, 0.0)
    return column, p, mass


@triton.jit
def residual(
    logits,
    stride,
    owners,
    lines,
    entries,
    bounds,
    starts,
    values,
    tokens,
    lengths,
    cu_lengths,
    temperatures,
    peaks,
    sums,
    edges,
    last_ties,
    draft,
    draft_peaks,
    draft_sums,
    t2d,
    accepted_in,
    finite_in,
    p_sums,
    mass_sums,
    slots,
    width,
    blocks,
    draft_width,
    draft_blocks,
    DRAFT: tl.constexpr,
    D2T: tl.constexpr,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    DRAFT_PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    temperature = tl.load(temperatures + request)
    if (temperature > 0) & (tl.load(finite_in + request) > 0):
        at = tl.load(accepted_in + request)
        row = tl.load(cu_lengths + request) + at
        _, p, mass = _correction(
            logits,
            stride,
            owners,
            lines,
            entries,
            bounds,
            starts,
            values,
            tokens,
            edges,
            last_ties,
            peaks,
            sums,
            draft,
            draft_peaks,
            draft_sums,
            t2d,
            row,
            request,
            at,
            at < tl.minimum(tl.load(lengths + request), slots),
            block,
            temperature,
            slots,
            width,
            blocks,
            draft_width,
            draft_blocks,
            DRAFT,
            D2T,
            OVERRIDES,
            SPAN,
            PADDED,
            DRAFT_PADDED,
        )
        tl.store(p_sums + request * blocks + block, tl.sum(p, 0))
        tl.store(mass_sums + request * blocks + block, tl.sum(mass, 0))


@triton.jit
def pick(
    logits,
    stride,
    owners,
    lines,
    entries,
    bounds,
    starts,
    values,
    tokens,
    lengths,
    cu_lengths,
    positions,
    temperatures,
    seeds,
    peaks,
    sums,
    edges,
    last_ties,
    draft,
    draft_peaks,
    draft_sums,
    t2d,
    accepted_in,
    finite_in,
    p_sums,
    mass_sums,
    next_out,
    slots,
    width,
    blocks,
    draft_width,
    draft_blocks,
    DRAFT: tl.constexpr,
    D2T: tl.constexpr,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    DRAFT_PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + request)
    if (temperature > 0) & (tl.load(finite_in + request) > 0):
        at = tl.load(accepted_in + request)
        rejected = at < tl.minimum(tl.load(lengths + request), slots)
        seed = tl.load(seeds + request)
        position = tl.load(positions + request) + 1 + at
        lane = tl.arange(0, PADDED)
        left = tl.load(mass_sums + request * blocks + lane, mask=lane < blocks, other=0.0)
        whole = tl.load(p_sums + request * blocks + lane, mask=lane < blocks, other=0.0)
        # Nothing may be left by rounding: then the draw is from p.
        some = tl.sum(left, 0) > 0
        stream = tl.where(rejected, _RESIDUAL, _BONUS).to(tl.int32)
        block = pick_block(tl.where(some, left, whole), blocks, stream, seed, position, PADDED)
        column, p, mass = _correction(
            logits,
            stride,
            owners,
            lines,
            entries,
            bounds,
            starts,
            values,
            tokens,
            edges,
            last_ties,
            peaks,
            sums,
            draft,
            draft_peaks,
            draft_sums,
            t2d,
            tl.load(cu_lengths + request) + at,
            request,
            at,
            rejected,
            block,
            temperature,
            slots,
            width,
            blocks,
            draft_width,
            draft_blocks,
            DRAFT,
            D2T,
            OVERRIDES,
            SPAN,
            PADDED,
            DRAFT_PADDED,
        )
        tl.store(next_out + request, pick_token(tl.where(some, mass, p), column, stream, seed, position).to(tl.int64))
