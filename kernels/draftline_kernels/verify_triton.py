"""`verify.verify` in Triton: fixed grids with early exits, no host synchronisation, nothing of size [T, V] written.

1. `stats`, grid (rows, blocks of 4096 ids): reads every target logit once; leaves each block's maximum, its place and
   its sum-exp. Under the ratio rule the same for the draft's rows.
2. `select`, grid (rows): only in rows with min-p, top-k or top-p: the smallest kept logit, by an 8-way search over the
   ordered bits of float32, and the block sums of what is kept. Its re-reads mostly come from the second-level cache,
   and blocks below the search's lower end are not read again.
3. `_accept`, grid (requests): walks a request's rows. Coupled and greedy rows pick a block by its sum, read it again
   (8 to 16 KB) and pick the token; ratio rows test the proposed token. It stops at the first mismatch.
4. `residual_triton`: the ratio rule's correction or bonus token.

Where requests have bias or penalties, the new logits of their touched tokens (`overrides`) are worked out before 1, and
one map per such request, which says where each token's is; all four read those in place of the target's. The map is
int16 [V], shared by the request's rows.

Letters as in `verify`; C blocks of the target's vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise_triton import uniform
from .overrides import Overrides
from .residual_triton import draft_column, draft_probability, pick, residual
from .sampling import BLOCK, STREAMS, Sampling
from .sampling_triton import (
    block_statistics,
    finite,
    is_kept,
    no_entries,
    overridden,
    pick_block,
    pick_token,
    row_total,
    scaled,
)
from .truncation_triton import WARPS as SELECTING
from .truncation_triton import select
from .verify import ACCEPT_STREAM, VerifyResult

WARPS = {"_accept": 8, "residual": 8, "pick": 8}
"""Of each kernel's launch, here and in the compile test."""
_TARGET = tl.constexpr(STREAMS["target"][0])
_ACCEPT = tl.constexpr(ACCEPT_STREAM)


@triton.jit
def _accept(
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
    places,
    peaks,
    sums,
    edges,
    last_ties,
    draft,
    draft_peaks,
    draft_sums,
    t2d,
    accepted_out,
    next_out,
    finite_out,
    slots,
    width,
    blocks,
    draft_width,
    draft_blocks,
    GREEDY: tl.constexpr,
    RATIO: tl.constexpr,
    DRAFT: tl.constexpr,
    D2T: tl.constexpr,
    OVERRIDES: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    DRAFT_PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + request), slots)
    start = tl.load(cu_lengths + request)
    position = tl.load(positions + request)
    temperature = tl.load(temperatures + request)
    seed = tl.load(seeds + request)
    # A request is either tested against q or compared with the target's own token.
    tested = temperature > 0
    if not RATIO:
        tested = temperature < 0
    lane = tl.arange(0, PADDED)
    accepted = tl.full((), 0, tl.int64)
    emitted = tl.full((), -1, tl.int64)
    usable = tl.full((), 1, tl.int32)
    alive = tl.full((), 1, tl.int32)
    for i in range(0, length + 1):
        row = start + i
        peak, mass, total = row_total(peaks + row * blocks, sums + row * blocks, blocks, PADDED)
        usable = tl.where(finite(peak), usable, 0)
        if alive > 0:
            offered = i < length
            # -1 is no token: it equals nothing and is never read.
            proposed = tl.load(tokens + request * slots + i, mask=offered, other=-1)
            proposed = tl.where(proposed < width, proposed, -1)
            same = tl.full((), 0, tl.int32)
            own_entries, own_bounds, own_values = overridden(
                owners, lines, entries, bounds, starts, values, row, width, blocks, OVERRIDES
            )
            if tested:
                if proposed >= 0:
                    x = scaled(
                        logits + row * stride,
                        proposed,
                        proposed // SPAN,
                        width,
                        temperature,
                        own_entries,
                        own_bounds,
                        own_values,
                        OVERRIDES,
                    )
                    kept = is_kept(x, proposed, tl.load(edges + row), tl.load(last_ties + row))
                    log_ratio = tl.where(kept, tl.log(tl.exp(x - peak) / total), float("-inf"))
                    if DRAFT:
                        at = draft_column(t2d, proposed, D2T)
                        q = draft_probability(
                            draft,
                            draft_peaks,
                            draft_sums,
                            request * slots + i,
                            at,
                            draft_width,
                            draft_blocks,
                            DRAFT_PADDED,
                        )
                        # A row that can't have proposed this token counts as certain of it.
                        log_ratio -= tl.log(tl.where(q > 0, q, 1.0))
                    stream = tl.full((), _ACCEPT, tl.int32)
                    u = uniform(stream, seed, position + 1 + i, tl.full((), 0, tl.int32))
                    same = (tl.log(u) < log_ratio).to(tl.int32)
            else:
                highest = tl.load(peaks + row * blocks + lane, mask=lane < blocks, other=float("-inf"))
                place = tl.load(places + row * blocks + lane, mask=lane < blocks, other=0)
                choice = tl.min(tl.where(highest == peak, place, width), 0)
                if not GREEDY:  # noqa: SIM102  a test of the compiler's, then one of the device's
                    if temperature > 0:
                        stream = tl.full((), _TARGET, tl.int32)
                        block = pick_block(mass / total, blocks, stream, seed, position + 1 + i, PADDED)
                        column = block * SPAN + tl.arange(0, SPAN)
                        x = scaled(
                            logits + row * stride,
                            column,
                            block,
                            width,
                            temperature,
                            own_entries,
                            own_bounds,
                            own_values,
                            OVERRIDES,
                        )
                        kept = is_kept(x, column, tl.load(edges + row), tl.load(last_ties + row))
                        p = tl.where(kept, tl.exp(x - peak) / total, 0.0)
                        choice = pick_token(p, column, stream, seed, position + 1 + i)
                emitted = choice.to(tl.int64)
                same = (emitted == proposed).to(tl.int32)
            accepted += same
            alive = same
    tl.store(accepted_out + request, tl.where(usable > 0, accepted, 0))
    tl.store(next_out + request, tl.where(usable > 0, emitted, -1))
    tl.store(finite_out + request, usable.to(tl.int8))


def verify(
    target_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    cu_lengths: Tensor,
    sampling: Sampling,
    positions: Tensor,
    rule: str,
    draft_logits: Tensor | None,
    d2t: Tensor | None,
    overrides: Overrides | None,
) -> VerifyResult:
    """As `verify.verify`, which has checked shapes and dtypes. Lengths above K count as K; a token outside the
    vocabulary is never kept. Nothing is read back by the host."""
    rows, width = target_logits.shape
    batch, slots = tokens.shape
    device = target_logits.device
    accepted = torch.empty(batch, dtype=torch.int64, device=device)
    chosen = torch.empty_like(accepted)
    usable = torch.empty(batch, dtype=torch.bool, device=device)
    tokens, lengths, cu_lengths = tokens.contiguous(), lengths.contiguous(), cu_lengths.contiguous()
    positions, seeds = positions.contiguous(), sampling.seed.contiguous()
    if overrides is None:
        owner = torch.repeat_interleave(torch.arange(batch, device=device), lengths + 1, output_size=rows)
        entries = no_entries(owner)
    else:
        owner = overrides.owner
        new = overrides.values(target_logits)[0]
        entries = (owner, overrides.lines, overrides.entries(width), overrides.bounds, overrides.at, new)
    temperatures = sampling.temperature[owner]
    peaks, places, sums = block_statistics(
        target_logits, temperatures, sampling.greedy, None if overrides is None else entries
    )
    blocks = peaks.shape[1]
    edges = torch.full((rows,), float("-inf"), device=device)
    last_ties = torch.empty(rows, dtype=torch.int32, device=device)
    widths = {"OVERRIDES": overrides is not None, "SPAN": BLOCK, "PADDED": triton.next_power_of_2(blocks)}
    logits = (target_logits, target_logits.stride(0), *entries)
    if not sampling.greedy:
        select[(rows,)](
            *logits,
            temperatures,
            sampling.top_k.contiguous(),
            sampling.top_p.contiguous(),
            sampling.min_p.log(),
            peaks,
            sums,
            edges,
            last_ties,
            width,
            blocks,
            **widths,
            num_warps=SELECTING["select"],
        )
    ratio = rule == "ratio" and not sampling.greedy
    draft, draft_peaks, draft_sums, t2d = target_logits, peaks, sums, last_ties
    if ratio and draft_logits is not None:
        draft = draft_logits.flatten(0, 1)
        offered = torch.arange(slots, device=device) < lengths[:, None]
        asked = (offered & (sampling.temperature > 0)[:, None]).flatten()
        draft_peaks, _, draft_sums = block_statistics(draft, torch.where(asked, 1.0, -1.0), greedy=False)
        if d2t is not None:
            t2d = torch.full((width,), -1, dtype=torch.int32, device=device)
            t2d[d2t] = torch.arange(d2t.shape[0], dtype=torch.int32, device=device)
    proposal = (draft, draft_peaks, draft_sums, t2d)
    sizes = (slots, width, blocks, draft.shape[1], draft_peaks.shape[1])
    options = {
        **widths,
        "DRAFT": ratio and draft_logits is not None,
        "D2T": ratio and draft_logits is not None and d2t is not None,
        "DRAFT_PADDED": triton.next_power_of_2(draft_peaks.shape[1]),
    }
    rows_of = (*logits, tokens, lengths, cu_lengths)
    own = (sampling.temperature.contiguous(), seeds)
    statistics = (peaks, sums, edges, last_ties)
    flags = usable.view(torch.int8)
    _accept[(batch,)](
        *rows_of,
        positions,
        *own,
        places,
        *statistics,
        *proposal,
        accepted,
        chosen,
        flags,
        *sizes,
        GREEDY=sampling.greedy,
        RATIO=ratio,
        **options,
        num_warps=WARPS["_accept"],
    )
    if ratio:
        p_sums = torch.empty(batch, blocks, device=device)
        mass_sums = torch.empty_like(p_sums)
        drawn = (*statistics, *proposal, accepted, flags, p_sums, mass_sums)
        residual[(batch, blocks)](*rows_of, own[0], *drawn, *sizes, **options, num_warps=WARPS["residual"])
        pick[(batch,)](*rows_of, positions, *own, *drawn, chosen, *sizes, **options, num_warps=WARPS["pick"])
    return VerifyResult(accepted, chosen, usable)
