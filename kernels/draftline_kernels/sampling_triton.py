"""`sampling` in Triton: reading logits, their block statistics, and the hierarchical draw.

Device functions for the kernels of `verify_triton` and `markov_block_triton`, and a kernel that both launch: `stats`
reads every logit of its rows once. The draws are those of `sampling.draw_mass`: the same blocks of 4096 target ids, the
same noise; only the rounding of sums may differ.

Where a request overrides logits (see `overrides`; OVERRIDES, compiled away where nobody does), every read of a row
takes the new values. `entries`, `bounds` and `values` are then the row's own pointers (`overridden`): the values from
bounds[block] to bounds[block + 1] are the block's new logits, and entries[id], int16, says which of them is an id's,
counted from 1; 0: none. Of a block without any, `entries` is not read: a request that overrides nothing has no line.

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

WARPS = {"stats": 8}
"""Of the kernel's launch, wherever it is launched, and in the compile test."""


@triton.jit
def overridden(owners, lines, entries, bounds, starts, values, row, width, blocks, OVERRIDES: tl.constexpr):
    """A row's own `entries`, `bounds` and `values`, the latter to be read at its request's bounds."""
    if OVERRIDES:
        owner = tl.load(owners + row)
        own = bounds + owner * (blocks + 1)
        return entries + tl.load(lines + owner) * width, own, values + tl.load(starts + row) - tl.load(own)
    else:
        return entries, bounds, values


@triton.jit
def scaled(row, column, block, width, temperature, entries, bounds, values, OVERRIDES: tl.constexpr):
    """float32 logits of a row at `column`, an id or several of one block, after temperature; -inf beyond the row;
    rounded as torch's division is."""
    x = tl.load(row + column, mask=column < width, other=float("-inf")).to(tl.float32)
    if OVERRIDES:
        first = tl.load(bounds + block)
        end = tl.where(tl.load(bounds + block + 1) > first, width, 0)
        entry = tl.load(entries + column, mask=column < end, other=0).to(tl.int32)
        x = tl.where(entry > 0, tl.load(values + first + entry - 1, mask=entry > 0, other=0.0), x)
    return tl.div_rn(x, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(x))


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
    owners,
    lines,
    entries,
    bounds,
    starts,
    values,
    temperatures,
    peaks,
    places,
    sums,
    width,
    blocks,
    GREEDY: tl.constexpr,
    SPAN: tl.constexpr,
    OVERRIDES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x width passes 2^31 at 14,000 rows
    block = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature < 0:  # nobody will ask
        return
    column = block * SPAN + tl.arange(0, SPAN)
    own_entries, own_bounds, own_values = overridden(
        owners, lines, entries, bounds, starts, values, row, width, blocks, OVERRIDES
    )
    x = scaled(logits + row * stride, column, block, width, temperature, own_entries, own_bounds, own_values, OVERRIDES)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    peak, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    out = row * blocks + block
    tl.store(peaks + out, tl.where(broken, float("nan"), peak))
    tl.store(places + out, block * SPAN + place)
    if not GREEDY:
        tl.store(sums + out, tl.where(peak > float("-inf"), tl.sum(tl.exp(x - peak), 0), 0.0))


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


Entries = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""owners, lines, entries, bounds, starts and values of the rows' overrides, as the kernels take them."""


def no_entries(owner: Tensor) -> Entries:
    """Of rows [N] that nobody overrides: never read, but by their owners."""
    return owner, owner, owner, owner, owner, owner


def block_statistics(
    logits: Tensor, temperatures: Tensor, greedy: bool, entries: Entries | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """peaks, places and sums [N, C] of logits [N, V] (rows dense) at float32 [N] temperatures; rows below 0 are left
    out, what they hold is undefined. entries: of rows whose logits are overridden."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    peaks = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    sums = torch.empty_like(peaks)
    stats[(rows, blocks)](
        logits,
        logits.stride(0),
        *(no_entries(places) if entries is None else entries),
        temperatures,
        peaks,
        places,
        sums,
        width,
        blocks,
        GREEDY=greedy,
        SPAN=BLOCK,
        OVERRIDES=entries is not None,
        num_warps=WARPS["stats"],
    )
    return peaks, places, sums
