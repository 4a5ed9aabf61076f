"""`ragged_paged_attention` in Triton: keys and values of a KV head are read once for all its query heads.

1. `_attend`, grid (tiles of queries, KV heads, splits): a tile's queries times the group's heads are the rows of one
   product. The tile's range of positions, from the first that its window sees to the last, is cut into splits, each
   with a softmax of its own. With one split the result is written, with more a normalised partial and its log-sum-exp.
2. `_combine`, grid (queries, heads), with more than one split only: the partials weighted by their log-sum-exps.

Grids depend on shapes alone, programs without work leave at once, and nothing waits for the device: a CUDA graph can
hold both launches. Statistics are float32, exponentials to base 2. Imported on CUDA only (or under Triton's
interpreter).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPAN = 256
"""Positions that a split has at least: with fewer, partials would cost as much as keys."""
_MOST_SPLITS = 64
_QUERIES = 8
"""Queries that a tile has room for at least, where its rows allow: a block to verify is read for once, though most
requests of its step have a single query."""
COMBINE_WARPS = 4
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _request_of(tile, cu_q, batch, TILE: tl.constexpr):
    """The request whose tiles hold `tile`: request b's begin at cu_q[b] // TILE + b, which leaves each request at least
    as many as its queries fill, whatever the counts: the host need not know them."""
    low = 0
    high = batch
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_q + middle) // TILE + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend(
    q,
    keys,
    values,
    page_table,
    cu_q,
    context,
    out,
    sums,
    scale,
    q_token,
    q_head,
    q_dim,
    k_head,
    k_cell,
    k_dim,
    v_head,
    v_cell,
    v_dim,
    table_row,
    table_page,
    tokens,
    batch,
    pages,
    cells,
    heads,
    splits,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUPS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    request = _request_of(tile, cu_q, batch, QUERIES)
    start = tl.load(cu_q + request)
    count = tl.load(cu_q + request + 1) - start
    first_query = (tile - start // QUERIES - request) * QUERIES
    if first_query < count:
        past = tl.load(context + request)
        row = tl.arange(0, ROWS)
        query = first_query + row // GROUPS
        own = past + query
        token = (start + query).to(tl.int64)  # tokens x heads x dim x splits passes 2^31, and so do cells x dim
        head = kv_head * GROUPS + row % GROUPS
        alive = (row // GROUPS < QUERIES) & (query < count) & (token < tokens)

        end = past + count
        if CAUSAL:
            end = tl.minimum(end, past + first_query + QUERIES)
        first = tl.full((), 0, tl.int32)
        if WINDOW > 0:
            first = tl.maximum(past + first_query - WINDOW + 1, 0)
            if not CAUSAL:
                first = tl.minimum(first, past)
        low = first // TILE * TILE
        high = end
        if SPLIT:
            # A multiple of TILE and of at least SPAN, so that short requests use few of the splits.
            own_span = tl.cdiv(tl.maximum(tl.cdiv(end - low, splits), SPAN), TILE) * TILE
            low += tl.program_id(2) * own_span
            high = tl.minimum(low + own_span, end)

        lane = tl.arange(0, PADDED)
        value_lane = tl.arange(0, VALUE_PADDED)
        at = token[:, None] * q_token + head[:, None] * q_head + lane[None, :].to(tl.int64) * q_dim
        asked = tl.load(q + at, mask=alive[:, None] & (lane < DIM)[None, :], other=0.0)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, VALUE_PADDED), tl.float32)
        for begin in range(low, high, TILE):
            position = begin + tl.arange(0, TILE)
            page = position // PAGE
            inside = (position >= first) & (position < high) & (page < pages)
            entry = request.to(tl.int64) * table_row + page.to(tl.int64) * table_page
            cell = tl.load(page_table + entry, mask=inside, other=0).to(tl.int64) * PAGE + position % PAGE
            inside = inside & (cell >= 0) & (cell < cells)
            # What is not the request's own is never loaded, not even with a weight of 0: it may be NaN.
            there = kv_head * k_head + cell[:, None] * k_cell + lane[None, :].to(tl.int64) * k_dim
            key = tl.load(keys + there, mask=inside[:, None] & (lane < DIM)[None, :], other=0.0)
            score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
            if SOFTCAP > 0:
                # The logistic function's tanh: tanh itself is not in Triton's language.
                score = SOFTCAP * (2.0 * tl.sigmoid(2.0 * score / SOFTCAP) - 1.0)
            seen = inside[None, :] & alive[:, None]
            if CAUSAL:
                seen = seen & (position[None, :] <= own[:, None])
                if WINDOW > 0:
                    seen = seen & (position[None, :] > own[:, None] - WINDOW)
            elif WINDOW > 0:
                seen = seen & ((position[None, :] > own[:, None] - WINDOW) | (position[None, :] >= past))
            score = tl.where(seen, score * _LOG2E, float("-inf"))
            raised = tl.maximum(peak, tl.max(score, 1))
            # A row that has seen nothing yet: -inf - -inf would be NaN.
            level = tl.where(raised > float("-inf"), raised, 0.0)
            weight = tl.exp2(score - level[:, None])
            kept = tl.exp2(peak - level)
            mass = mass * kept + tl.sum(weight, 1)
            there = kv_head * v_head + cell[:, None] * v_cell + value_lane[None, :].to(tl.int64) * v_dim
            value = tl.load(values + there, mask=inside[:, None] & (value_lane < VALUE_DIM)[None, :], other=0.0)
            total = tl.dot(weight.to(value.dtype), value, total * kept[:, None], input_precision="ieee")
            peak = raised
        result = total / tl.where(mass > 0, mass, 1.0)[:, None]
        place = token * heads + head
        if SPLIT:
            place = place * splits + tl.program_id(2)
            tl.store(sums + place, tl.where(mass > 0, peak + tl.log2(mass), float("-inf")), mask=alive)
        to = out + place[:, None] * VALUE_DIM + value_lane[None, :]
        # A split without positions has no partial: its log-sum-exp says so.
        written = alive & ((not SPLIT) | (mass > 0))
        tl.store(to, result, mask=written[:, None] & (value_lane < VALUE_DIM)[None, :])


@triton.jit
def _combine(
    partials,
    sums,
    cu_q,
    out,
    batch,
    heads,
    splits,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token = tl.program_id(0)
    if token < tl.load(cu_q + batch):
        place = token.to(tl.int64) * heads + tl.program_id(1)
        split = tl.arange(0, SPLITS)
        lane = tl.arange(0, VALUE_PADDED)
        own = tl.load(sums + place * splits + split, mask=split < splits, other=float("-inf"))
        peak = tl.max(own, 0)
        weight = tl.exp2(own - tl.where(peak > float("-inf"), peak, 0.0))
        at = (place * splits + split)[:, None] * VALUE_DIM + lane[None, :]
        there = (own > float("-inf"))[:, None] & (lane < VALUE_DIM)[None, :]
        partial = tl.load(partials + at, mask=there, other=0.0)
        mass = tl.sum(weight, 0)
        result = tl.sum(partial * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
        tl.store(out + place * VALUE_DIM + lane, result, mask=lane < VALUE_DIM)


def shapes(groups: int, dim: int, value_dim: int, itemsize: int, queries: int) -> dict[str, int]:
    """Sizes of a program of `_attend`: 16 KiB of keys at a time, and rows for the queries of most requests.

    Args:
        groups: query heads per KV head. dim, value_dim: d and dv. itemsize: bytes of a number.
        queries: a request's mean number of queries.

    Returns:
        The constants by name, num_warps and num_stages among them.
    """
    padded, value_padded = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    wide = max(padded, value_padded) * itemsize
    # float32 products have no tensor cores: more rows than 32 spill registers.
    rows = min(triton.next_power_of_2(max(queries, _QUERIES) * groups), 128 if itemsize == 2 else 32, 32768 // wide)
    rows = max(rows, triton.next_power_of_2(groups), 16)
    return {
        "ROWS": rows,
        "TILE": min(max(16384 // wide, 16), 128),
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "PADDED": padded,
        "VALUE_PADDED": value_padded,
        "num_warps": 8 if rows > (64 if itemsize == 2 else 16) else 4,
        "num_stages": 2,
    }


def _splits(programs: int, positions: int, device: torch.device) -> int:
    """How many splits give every multiprocessor two programs; 1 where there are enough programs without."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // max(programs, 1), triton.cdiv(positions, _SPAN), _MOST_SPLITS))


def ragged_paged_attention(
    q: Tensor,
    k_cells: Tensor,
    v_cells: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    context: Tensor,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    *,
    few: bool = False,
    splits: int | None = None,
    span: int = _SPAN,
) -> Tensor:
    """As `ragged_paged_attention.ragged_paged_attention`, which has checked the arguments.

    Args:
        splits: parts that a request's positions are cut into at most; None: as many as fill the device.
        span: positions that a part has at least.
    """
    tokens, heads, dim = q.shape
    kv_heads, cells, value_dim = v_cells.shape
    batch, pages = page_table.shape
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    if tokens == 0 or batch == 0:
        return out
    groups = heads // kv_heads
    sizes = shapes(groups, dim, value_dim, q.element_size(), triton.cdiv(tokens, batch))
    queries = sizes["ROWS"] // groups
    if splits is None:
        tiles = triton.cdiv(tokens, queries)
        splits = _splits((tiles if few else max(batch, tiles)) * kv_heads, pages * page_size, q.device)
    partials, sums = out, out
    if splits > 1:
        partials = torch.empty(tokens, heads, splits, value_dim, device=q.device)
        sums = torch.empty(tokens, heads, splits, device=q.device)
    starts, before = cu_q.contiguous(), context.contiguous()
    strides = (*q.stride(), *k_cells.stride(), *v_cells.stride(), *page_table.stride())
    flags: dict[str, Any] = {"WINDOW": window, "SOFTCAP": float(softcap), "CAUSAL": causal, "SPLIT": splits > 1}
    _attend[(tokens // queries + batch, kv_heads, splits)](
        q,
        k_cells,
        v_cells,
        page_table,
        starts,
        before,
        partials,
        sums,
        scale,
        *strides,
        tokens,
        batch,
        pages,
        cells,
        heads,
        splits,
        GROUPS=groups,
        PAGE=page_size,
        SPAN=span,
        **flags,
        **sizes,
    )
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        value_padded = sizes["VALUE_PADDED"]
        _combine[(tokens, heads)](
            partials,
            sums,
            starts,
            out,
            batch,
            heads,
            splits,
            VALUE_DIM=value_dim,
            VALUE_PADDED=value_padded,
            SPLITS=padded,
            num_warps=COMBINE_WARPS,
        )
    return out
