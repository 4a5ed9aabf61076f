"""`row_losses.row_losses_` in Triton: one program per row, three sweeps over the row's logits (four where the target's
normaliser is not given).

Sweep 1 takes the maximum, sum-exp and argmax of the draft's logits online, and of the target's (whose normaliser is
known) the mass inside and the two sums of the KL; sweep 2, with q now normalised, sum |q - p|, sum q sign(q - p) and
what further losses ask for;
sweep 3 writes the gradient over the logits. Rows in flight stay in the second-level cache between sweeps, so device
memory sees about one read of each logit and one write of each gradient. All arithmetic is float32.

Imported on CUDA only (or under Triton's interpreter): the package works without Triton elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_losses import FLOOR, RowStats, RowTargets

TILE = 4096
"""Columns of a sweep at once, where a row has as many."""


@triton.jit
def _capped(x, cap):
    """cap tanh(x / cap), by the logistic function: tanh itself is not in Triton's language."""
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)


@triton.jit
def _logits(base_row, bias_row, column, width, cap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr):
    """The draft's logits of a tile, -inf beyond the row."""
    z = tl.load(base_row + column, mask=column < width, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = _capped(z, cap)
    if BIAS:
        z += tl.load(bias_row + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(column < width, z, float("-inf"))


@triton.jit
def _log_p(target_row, column, width, normaliser, cap, SOFTCAP: tl.constexpr):
    """The target's log-probabilities of a tile, -inf beyond the row."""
    t = tl.load(target_row + column, mask=column < width, other=0.0).to(tl.float32)
    if SOFTCAP:
        t = _capped(t, cap)
    return tl.where(column < width, t - normaliser, float("-inf"))


@triton.jit
def _row_losses(
    base,
    bias,
    target,
    base_stride,
    bias_stride,
    target_stride,
    normalisers,
    target_best,
    labels,
    ce_weight,
    kl_weight,
    l1_weight,
    rkl_weight,
    lk_weight,
    hybrid_weight,
    ce,
    kl,
    l1,
    agree,
    rkl,
    overlap,
    width,
    cap,
    eta,
    floor,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALISER: tl.constexpr,
    BEST: tl.constexpr,
    RKL: tl.constexpr,
    LK: tl.constexpr,
    HYBRID: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x width passes 2^31
    base_row = base + row * base_stride
    bias_row = bias + row * bias_stride
    target_row = target + row * target_stride
    label = tl.load(labels + row)
    lane = tl.arange(0, TILE)

    if NORMALISER:
        normaliser = tl.load(normalisers + row)
    else:
        top = tl.full((), float("-inf"), tl.float32)
        whole = tl.full((), 0.0, tl.float32)
        for start in range(0, width, TILE):
            t = _log_p(target_row, start + lane, width, 0.0, cap, SOFTCAP)
            raised = tl.maximum(top, tl.max(t, 0))
            whole = whole * tl.exp(top - raised) + tl.sum(tl.exp(t - raised), 0)
            top = raised
        normaliser = top + tl.log(whole)

    # Every running value is one per row: tiles are reduced at once, so the tile's registers are all that is live.
    peak = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    likeliest = tl.full((), float("-inf"), tl.float32)
    target_place = tl.full((), 0, tl.int64)
    at_label = tl.full((), 0.0, tl.float32)
    within = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    crossed = tl.full((), 0.0, tl.float32)
    for start in range(0, width, TILE):
        column = start + lane
        inside = column < width
        z = _logits(base_row, bias_row, column, width, cap, SOFTCAP, BIAS)
        highest, where = tl.max(z, 0, return_indices=True, return_indices_tie_break_left=True)
        # Strictly above: the lowest id wins a tie.
        best = tl.where(highest > peak, start + where, best)
        raised = tl.maximum(peak, highest)
        # The sum of p z is kept relative to the running maximum, as the sum-exp is, so that large logits cost nothing.
        scale = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - raised))
        crossed += within * tl.where(peak == float("-inf"), 0.0, peak - raised)
        mass = mass * scale + tl.sum(tl.exp(z - raised), 0)
        at_label += tl.sum(tl.where(column == label, z, 0.0), 0)
        log_p = _log_p(target_row, column, width, normaliser, cap, SOFTCAP)
        if not BEST:
            tall, spot = tl.max(log_p, 0, return_indices=True, return_indices_tie_break_left=True)
            target_place = tl.where(tall > likeliest, (start + spot).to(tl.int64), target_place)
            likeliest = tl.maximum(likeliest, tall)
        p = tl.exp(log_p)
        entropy += tl.sum(p * tl.where(inside, log_p, 0.0), 0)
        crossed += tl.sum(p * tl.where(inside, z - raised, 0.0), 0)
        within += tl.sum(p, 0)
        peak = raised
    log_mass = tl.log(mass)
    own = tl.where(label >= 0, 1.0, 0.0)
    tl.store(ce + row, (log_mass + peak - at_label) * own)
    # p may stay outside altogether: then there is nothing to divide by, and no KL.
    log_within = tl.log(tl.maximum(within, 1e-30))
    tl.store(kl + row, entropy - crossed + within * (log_mass - log_within))
    if BEST:
        target_place = tl.load(target_best + row)
    tl.store(agree + row, (best.to(tl.int64) == target_place).to(tl.int8))

    apart = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    reverse = tl.full((), 0.0, tl.float32)
    shared = tl.full((), 0.0, tl.float32)
    for start in range(0, width, TILE):
        column = start + lane
        z = _logits(base_row, bias_row, column, width, cap, SOFTCAP, BIAS)
        q = tl.exp(z - peak) / mass
        log_p = _log_p(target_row, column, width, normaliser, cap, SOFTCAP)
        difference = q - tl.exp(log_p)
        if RKL:
            reverse += tl.sum(q * tl.where(column < width, z - peak - log_mass - log_p, 0.0), 0)
        if LK or HYBRID:
            shared += tl.sum(tl.minimum(q, tl.exp(log_p)), 0)
        apart += tl.sum(tl.abs(difference), 0)
        mean += tl.sum(tl.where(difference > 0, q, 0.0) - tl.where(difference < 0, q, 0.0), 0)
    tl.store(l1 + row, apart + tl.maximum(1.0 - within, 0.0))
    if RKL:
        tl.store(rkl + row, reverse)
    if LK or HYBRID:
        tl.store(overlap + row, shared)

    if GRADIENT:
        pull = tl.load(kl_weight + row)
        push = tl.load(l1_weight + row)
        if LK:
            push += tl.load(lk_weight + row) / (2.0 * tl.maximum(shared, floor))
        if HYBRID:
            share = tl.exp(-eta * shared)
            hybrid = tl.load(hybrid_weight + row)
            pull += hybrid * share
            push += hybrid * (1.0 - share) * 0.5
        own *= tl.load(ce_weight + row)
        shift = own + pull * within - push * mean
        if RKL:
            back = tl.load(rkl_weight + row)
            shift -= back * reverse
        for start in range(0, width, TILE):
            column = start + lane
            inside = column < width
            z = _logits(base_row, bias_row, column, width, cap, SOFTCAP, BIAS)
            q = tl.exp(z - peak) / mass
            log_p = _log_p(target_row, column, width, normaliser, cap, SOFTCAP)
            p = tl.exp(log_p)
            factor = push * (tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0)) + shift
            if RKL:
                factor += back * tl.where(inside, z - peak - log_mass - log_p, 0.0)
            gradient = q * factor - pull * p - tl.where(column == label, own, 0.0)
            slope = gradient
            if SOFTCAP:
                bent = _capped(tl.load(base_row + column, mask=inside, other=0.0).to(tl.float32), cap) / cap
                slope = gradient * (1.0 - bent * bent)
            # Each lane writes what only it has read.
            if BIAS:
                tl.store(bias_row + column, gradient.to(bias.dtype.element_ty), mask=inside)
            tl.store(base_row + column, slope.to(base.dtype.element_ty), mask=inside)


def warps(tile: int) -> int:
    """Of a launch over so many columns at once."""
    return 16 if tile >= 2048 else 4


def row_losses_(
    base: Tensor,
    bias: Tensor | None,
    target: Tensor,
    targets: RowTargets,
    out: RowStats,
    *,
    softcap: float = 0.0,
    eta: float = 3.0,
    gradient: bool = True,
    tile: int = TILE,
) -> None:
    """As `vocab_loss.row_losses_`, which has checked the arguments; tile: columns at once, a power of two."""
    rows, width = base.shape
    if rows == 0:
        return
    second = base if bias is None else bias
    more = targets.rkl_weight, targets.lk_weight, targets.hybrid_weight
    tile = min(tile, triton.next_power_of_2(width))
    _row_losses[(rows,)](
        base,
        second,
        target,
        base.stride(0),
        second.stride(0),
        target.stride(0),
        targets.ce_weight if targets.log_normaliser is None else targets.log_normaliser.contiguous(),
        targets.labels if targets.target_best is None else targets.target_best.contiguous(),
        targets.labels.contiguous(),
        targets.ce_weight.contiguous(),
        targets.kl_weight.contiguous(),
        targets.l1_weight.contiguous(),
        *(targets.l1_weight if w is None else w.contiguous() for w in more),
        out.ce,
        out.kl,
        out.l1,
        out.agree.view(torch.int8),
        out.l1 if out.rkl is None else out.rkl,
        out.l1 if out.overlap is None else out.overlap,
        width,
        float(softcap) or 1.0,
        float(eta),
        FLOOR,
        SOFTCAP=bool(softcap),
        BIAS=bias is not None,
        NORMALISER=targets.log_normaliser is not None,
        BEST=targets.target_best is not None,
        RKL=more[0] is not None,
        LK=more[1] is not None,
        HYBRID=more[2] is not None,
        GRADIENT=gradient,
        TILE=tile,
        num_warps=warps(tile),
    )
