"""`markov_block` in Triton: two launches per slot, W2 read once per slot for the whole batch.

1. `_bias`, grid (tiles of columns, groups of requests): base + code W2^T, temperature, and per request and tile the
   maximum, its place, the sum-exp and the winner of the token noise. Logits are written only where they are kept or
   truncated. A tile never leaves a block of 4096 target ids, so block sums are sums of tiles.
2. `_combine`, grid (requests): the block by its sum and noise, in it the best tile's winner: the token.

Rows with min-p, top-k or top-p need the whole row first: `stats` and `select` on the written logits,
then `_truncated`, grid (requests), which masks the row and draws from what is left. Sampling without them skips all
three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .markov_block import Block, Code
from .noise_triton import gumbel
from .sampling import BLOCK, STREAMS, Sampling
from .sampling_triton import block_statistics, is_kept, no_entries
from .truncation_triton import WARPS as SELECTING
from .truncation_triton import select

_TILE = 64
WARPS = {"_bias": 8, "_combine": 4, "_truncated": 8}
"""Of each kernel's launch, here and in the compile test."""


@triton.jit
def _bias(
    base,
    base_request,
    base_slot,
    codes,
    w2,
    w2_stride,
    d2t,
    temperatures,
    seeds,
    positions,
    starts,
    ends,
    kept,
    kept_request,
    kept_slot,
    peaks,
    places,
    sums,
    scores,
    winners,
    slot,
    batch,
    rank,
    tiles,
    stream,
    MARKOV: tl.constexpr,
    D2T: tl.constexpr,
    GREEDY: tl.constexpr,
    WRITE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(0)
    request = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    here = request < batch
    column = tl.load(starts + tile) + tl.arange(0, TILE)
    inside = column < tl.load(ends + tile)
    valid = here[:, None] & inside[None, :]
    row = request.to(tl.int64)
    at = row[:, None] * base_request + slot * base_slot + column[None, :]
    z = tl.load(base + at, mask=valid, other=0.0).to(tl.float32)
    if MARKOV:
        total = tl.zeros((GROUP, TILE), tl.float32)
        for start in range(0, rank, DEPTH):
            part = start + tl.arange(0, DEPTH)
            code = tl.load(
                codes + row[:, None] * rank + part[None, :], mask=here[:, None] & (part < rank)[None, :], other=0.0
            )
            there = column[:, None].to(tl.int64) * w2_stride + part[None, :]
            weight = tl.load(w2 + there, mask=inside[:, None] & (part < rank)[None, :], other=0.0)
            total = tl.dot(code, tl.trans(weight), total, input_precision="ieee")
        z += total
    temperature = tl.load(temperatures + request, mask=here, other=1.0)
    z = tl.div_rn(z, tl.where(temperature > 0, temperature, 1.0)[:, None] + tl.zeros_like(z))
    z = tl.where(valid, z, float("-inf"))
    if WRITE:
        tl.store(kept + row[:, None] * kept_request + slot * kept_slot + column[None, :], z, mask=valid)
    out = row * tiles + tile
    peak, place = tl.max(z, 1, return_indices=True, return_indices_tie_break_left=True)
    tl.store(peaks + out, peak, mask=here)
    tl.store(places + out, tl.load(starts + tile) + place, mask=here)
    if not GREEDY:
        relative = tl.where(peak[:, None] > float("-inf"), tl.exp(z - peak[:, None]), 0.0)
        tl.store(sums + out, tl.sum(relative, 1), mask=here)
        token = column
        if D2T:
            token = tl.load(d2t + column, mask=inside, other=0).to(tl.int32)
        seed = tl.load(seeds + request, mask=here, other=0)
        position = tl.load(positions + request, mask=here, other=0)
        noise = gumbel(tl.full((), 1, tl.int32) + stream, seed[:, None], position[:, None], token[None, :])
        score, winner = tl.max(z + noise, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(scores + out, score, mask=here)
        tl.store(winners + out, tl.load(starts + tile) + winner, mask=here)


@triton.jit
def _combine(
    peaks,
    places,
    sums,
    scores,
    winners,
    blocks_of,
    d2t,
    temperatures,
    seeds,
    positions,
    out,
    width,
    tiles,
    blocks,
    stream,
    D2T: tl.constexpr,
    GREEDY: tl.constexpr,
    PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    here = tile < tiles
    at = request * tiles + tile
    highest = tl.load(peaks + at, mask=here, other=float("-inf"))
    best = tl.argmax(highest, 0, tie_break_left=True)
    column = tl.load(places + request * tiles + best)
    if not GREEDY:  # noqa: SIM102  a test of the compiler's, then one of the device's
        if tl.load(temperatures + request) > 0:
            seed = tl.load(seeds + request)
            position = tl.load(positions + request)
            peak = tl.max(highest, 0)
            mass = tl.load(sums + at, mask=here, other=0.0) * tl.exp(highest - peak)
            mass = tl.where(highest > float("-inf"), mass, 0.0)
            total = tl.sum(mass, 0)
            block_of = tl.load(blocks_of + tile, mask=here, other=-1)
            chosen = tl.full((), 0, tl.int32)
            top = tl.full((), float("-inf"), tl.float32)
            for block in range(0, blocks):
                own = tl.sum(tl.where(block_of == block, mass, 0.0), 0) / total
                noise = gumbel(tl.full((), 0, tl.int32) + stream, seed, position, tl.full((), 0, tl.int32) + block)
                score = tl.where(own > 0, tl.log(own) + noise, float("-inf"))
                chosen = tl.where(score > top, block, chosen)
                top = tl.maximum(top, score)
            score = tl.load(scores + at, mask=here & (block_of == chosen), other=float("-inf"))
            winner = tl.argmax(score, 0, tie_break_left=True)
            column = tl.load(winners + request * tiles + winner)
    column = tl.minimum(tl.maximum(column, 0), width - 1)  # a row that is not finite still yields an id
    token = column.to(tl.int64)
    if D2T:
        token = tl.load(d2t + column)
    tl.store(out + request, token)


@triton.jit
def _truncated(
    kept,
    stride,
    peaks,
    edges,
    last_ties,
    bounds,
    d2t,
    temperatures,
    top_k,
    top_p,
    floors,
    seeds,
    positions,
    out,
    width,
    column_blocks,
    blocks,
    stream,
    D2T: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + request)
    p = tl.load(top_p + request)
    floor = tl.load(floors + request)
    narrowed = ((k > 0) & (k < width)) | (p < 1) | (floor > float("-inf"))
    if (tl.load(temperatures + request) > 0) & narrowed:
        row = kept + request * stride
        edge = tl.load(edges + request)
        last_tie = tl.load(last_ties + request)
        seed = tl.load(seeds + request)
        position = tl.load(positions + request)
        lane = tl.arange(0, SPAN)
        across = tl.arange(0, PADDED)
        highest = tl.load(peaks + request * column_blocks + across, mask=across < column_blocks, other=float("-inf"))
        peak = tl.max(highest, 0)
        total = tl.full((), 0.0, tl.float32)
        for block in range(0, blocks):
            low = tl.load(bounds + block)
            column = low + lane
            x = tl.load(row + column, mask=column < tl.load(bounds + block + 1), other=float("-inf"))
            total += tl.sum(tl.where(is_kept(x, column, edge, last_tie), tl.exp(x - peak), 0.0), 0)
        chosen = tl.full((), 0, tl.int32)
        top = tl.full((), float("-inf"), tl.float32)
        for block in range(0, blocks):
            low = tl.load(bounds + block)
            column = low + lane
            inside = column < tl.load(bounds + block + 1)
            x = tl.load(row + column, mask=inside, other=float("-inf"))
            stays = is_kept(x, column, edge, last_tie)
            own = tl.sum(tl.where(stays, tl.exp(x - peak), 0.0), 0) / total
            noise = gumbel(tl.full((), 0, tl.int32) + stream, seed, position, tl.full((), 0, tl.int32) + block)
            score = tl.where(own > 0, tl.log(own) + noise, float("-inf"))
            chosen = tl.where(score > top, block, chosen)
            top = tl.maximum(top, score)
            tl.store(row + column, tl.where(stays, x, float("-inf")), mask=inside)
        tl.debug_barrier()  # other threads wrote what is read next
        low = tl.load(bounds + chosen)
        column = low + lane
        inside = column < tl.load(bounds + chosen + 1)
        x = tl.load(row + column, mask=inside, other=float("-inf"))
        token = column.to(tl.int64)
        if D2T:
            token = tl.load(d2t + column, mask=inside, other=0)
        noise = gumbel(tl.full((), 1, tl.int32) + stream, seed, position, token)
        score = tl.where(x > float("-inf"), tl.log(tl.exp(x - peak) / total) + noise, float("-inf"))
        best = tl.argmax(score, 0, tie_break_left=True)
        tl.store(out + request, tl.sum(tl.where(lane == best, token, 0), 0))


def tile_count(width: int, blocks: int) -> int:
    """As many tiles as could ever be needed for so many columns in so many blocks."""
    return triton.cdiv(width, _TILE) + blocks - 1


def _tiles(bounds: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of at most 64 columns that never leave a block: starts, ends, block of each, int32; `tile_count` of them,
    so that the host need not know how many are needed. Those left over are empty and belong to the last block."""
    lengths = bounds.diff()
    count = (lengths + _TILE - 1) // _TILE
    last = count.cumsum(0)
    tile = torch.arange(tile_count(width, len(lengths)), device=bounds.device)
    block = torch.searchsorted(last, tile, right=True).clamp_(max=len(lengths) - 1)
    start = bounds[block] + (tile - (last - count)[block]) * _TILE
    end = torch.minimum(start + _TILE, bounds[block + 1])
    return tuple(t.to(torch.int32) for t in (torch.minimum(start, end), end, block))  # type: ignore[return-value]


def markov_block(
    base: Tensor,
    code: Code | None,
    w2: Tensor | None,
    anchor_tokens: Tensor,
    anchors: Tensor,
    sampling: Sampling,
    vocabulary: int,
    d2t: Tensor | None,
    stream: str,
    own_anchor: Tensor | None,
    logits: bool,
) -> Block:
    """As `markov_block.markov_block`, which has checked the arguments; `own_anchor` keys the noise by the round too."""
    batch, slots, width = base.shape
    device = base.device
    blocks = triton.cdiv(vocabulary, BLOCK)
    edges_of = torch.arange(blocks + 1, device=device) * BLOCK
    bounds = edges_of.clamp(max=width) if d2t is None else torch.searchsorted(d2t, edges_of)
    starts, ends, block_of = _tiles(bounds, width)
    bounds = bounds.to(torch.int32)
    tiles = len(starts)
    truncated = not sampling.greedy and sampling.truncated
    write = logits or truncated
    kept = torch.empty(batch, slots if logits else 1, width, device=device) if write else base.new_empty(1, 1, 1)
    tokens = torch.empty(slots, batch, dtype=torch.int64, device=device)
    if batch == 0:
        return Block(tokens.T, tokens.T, kept if logits else None)
    peaks, sums, scores = (torch.empty(batch, tiles, device=device) for _ in range(3))
    places, winners = (torch.empty(batch, tiles, dtype=torch.int32, device=device) for _ in range(2))
    temperatures, seeds = sampling.temperature.contiguous(), sampling.seed.contiguous()
    narrowing = (sampling.top_k.contiguous(), sampling.top_p.contiguous(), sampling.min_p.log())
    ids = anchors if d2t is None else d2t.contiguous()
    group = min(max(16, triton.next_power_of_2(batch)), 64)
    choice = STREAMS[stream][0]
    flags = {"D2T": d2t is not None, "GREEDY": sampling.greedy}
    seen = []
    previous = anchor_tokens
    for k in range(slots):
        seen.append(previous)
        position = anchors + 1 + k
        if own_anchor is not None:
            position = position | ((own_anchor + 1) << 32)
        codes, weights = base, base
        if code is not None and w2 is not None:
            codes, weights = code(k, previous).to(w2.dtype).contiguous(), w2
        _bias[(tiles, triton.cdiv(batch, group))](
            base,
            base.stride(0),
            base.stride(1),
            codes,
            weights,
            weights.stride(0),
            ids,
            temperatures,
            seeds,
            position,
            starts,
            ends,
            kept,
            kept.stride(0),
            kept.stride(1) if logits else 0,
            peaks,
            places,
            sums,
            scores,
            winners,
            k,
            batch,
            codes.shape[-1],
            tiles,
            choice,
            MARKOV=w2 is not None,
            WRITE=write,
            TILE=_TILE,
            GROUP=group,
            DEPTH=64,
            **flags,
            num_warps=WARPS["_bias"],
        )
        drawn = (temperatures, seeds, position, tokens[k])
        sizes = (width, tiles, blocks, choice)
        partials = (peaks, places, sums, scores, winners)
        whole = {"PADDED": triton.next_power_of_2(tiles), "num_warps": WARPS["_combine"]}
        _combine[(batch,)](*partials, block_of, ids, *drawn, *sizes, **whole, **flags)
        if truncated:
            rows = kept[:, k if logits else 0]
            # Temperature is in the logits already; rows that are not asked for are left out.
            unit = torch.where(temperatures > 0, 1.0, -1.0)
            row_peaks, _, row_sums = block_statistics(rows, unit, greedy=False)
            row_edges = torch.empty(batch, device=device)
            row_ties = torch.empty(batch, dtype=torch.int32, device=device)
            rows_of = (rows, rows.stride(0), *no_entries(torch.arange(batch, device=device)))
            spans = {"SPAN": BLOCK, "PADDED": triton.next_power_of_2(row_peaks.shape[1])}
            cut = (row_peaks, row_sums, row_edges, row_ties, width, row_peaks.shape[1])
            wide = {**spans, "OVERRIDES": False, "num_warps": SELECTING["select"]}
            select[(batch,)](*rows_of, unit, *narrowing, *cut, **wide)
            _truncated[(batch,)](
                rows,
                rows.stride(0),
                row_peaks,
                row_edges,
                row_ties,
                bounds,
                ids,
                temperatures,
                *narrowing,
                seeds,
                position,
                tokens[k],
                width,
                row_peaks.shape[1],
                blocks,
                choice,
                D2T=d2t is not None,
                **spans,
                num_warps=WARPS["_truncated"],
            )
        previous = tokens[k]
    return Block(tokens.T.contiguous(), torch.stack(seen, 1), kept if logits else None)
