"""Attention of a step's new tokens over a paged cache of keys and values, every request over its own pages.

The tokens of all requests are one ragged row of queries. A request's position p lies in cell
page_table[b, p // page_size] * page_size + p % page_size; the new tokens' keys and values are there already. This
module holds the definition and the torch reference; on CUDA the work is done by `ragged_paged_attention_triton`.

Letters: T queries of the step, B requests, H query heads, Hkv KV heads, d and dv dims of a key and of a value,
P pages that a request's row of the table has room for, n_b = context_b + count_b positions of request b.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(
    q: Tensor,
    k_cells: Tensor,
    v_cells: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    context: Tensor,
    page_size: int,
    window: int,
    softcap: float,
) -> None:
    """Raises ValueError, naming the argument, unless shapes, dtypes and devices fit each other."""
    if q.dim() != 3 or q.dtype not in _DTYPES or 0 in q.shape[1:]:
        raise ValueError(f"q is {q.dtype} {list(q.shape)}; expected float32, float16 or bfloat16 [T, H > 0, d > 0]")
    for name, value in (("k_cells", k_cells), ("v_cells", v_cells)):
        if value.dim() != 3 or 0 in value.shape[::2] or value.dtype != q.dtype or value.device != q.device:
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)} on {value.device}; expected {q.dtype} [Hkv > 0, cells, "
                f"dim > 0] on {q.device}, as q"
            )
    if k_cells.shape[2] != q.shape[2]:
        raise ValueError(f"k_cells has dim {k_cells.shape[2]}, q has {q.shape[2]}")
    if v_cells.shape[:2] != k_cells.shape[:2]:
        raise ValueError(
            f"v_cells has {list(v_cells.shape[:2])} KV heads and cells, k_cells has {list(k_cells.shape[:2])}"
        )
    if q.shape[1] % k_cells.shape[0]:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {k_cells.shape[0]} KV heads of k_cells")
    if page_table.dim() != 2:
        raise ValueError(f"page_table has shape {list(page_table.shape)}; expected [B, P]")
    batch = page_table.shape[0]
    for name, value, size in (("cu_q", cu_q, batch + 1), ("context", context, batch)):
        if value.shape != (size,):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [{size}] for {batch} requests")
    for name, value in (("page_table", page_table), ("cu_q", cu_q), ("context", context)):
        if value.dtype != torch.int32 or value.device != q.device:
            raise ValueError(f"{name} is {value.dtype} on {value.device}; expected int32 on {q.device}")
    if page_size < 1 or k_cells.shape[1] % page_size:
        raise ValueError(f"page_size {page_size} must be at least 1 and divide the {k_cells.shape[1]} cells")
    if window < 0:
        raise ValueError(f"window {window} is negative; 0 stands for all positions")
    if softcap < 0:
        raise ValueError(f"softcap {softcap} is negative; 0 stands for none")


def _check_values(q: Tensor, page_table: Tensor, cu_q: Tensor, context: Tensor, page_size: int) -> None:
    """Raises ValueError unless starts and lengths fit. On CUDA this would wait for the device: there the kernel leaves
    out what lies out of bounds by itself."""
    starts, before = cu_q.tolist(), context.tolist()
    if starts[0] != 0 or starts[-1] > q.shape[0] or any(a > b for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"cu_q {starts} must start at 0, never fall and end within the {q.shape[0]} rows of q")
    room = page_table.shape[1] * page_size
    for b, past in enumerate(before):
        total = past + starts[b + 1] - starts[b]
        if past < 0 or total > room:
            raise ValueError(
                f"request {b} has {past} positions of context and {total} in all; page_table has room for {room}"
            )


def ragged_paged_attention(
    q: Tensor,
    k_cells: Tensor,
    v_cells: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    context: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    few: bool = False,
) -> Tensor:
    """Attention of every query over the positions of its own request.

    Rows cu_q[b] .. cu_q[b + 1] of `q` are request b's new tokens, at positions context[b] and on. Statistics are
    float32; query head h reads KV head h // (H / Hkv).

    Args:
        q: [T, H, d], float32, float16 or bfloat16, any strides.
        k_cells: [Hkv, cells, d], v_cells: [Hkv, cells, dv], of q's dtype, any strides; cells are whole pages.
        page_table: int32 [B, P] page ids of each request, in the order of its positions. Entries of pages that nobody
            sees, past the end or before every window, are not read.
        cu_q: int32 [B + 1], starting at 0, growing by each request's number of queries (0 is allowed). Rows of q past
            its end belong to nobody; what is returned for them is undefined.
        context: int32 [B] positions before the first new token.
        page_size: positions per page.
        scale: factor on q k^T.
        window: positions that a query sees, its own included; 0: all.
        softcap: c of c * tanh(scores / c), after the scale; 0: none.
        causal: True: query j of request b sees the positions up to context_b + j (a target). False: it sees the whole
            context and all new tokens, those after it too (a draft's block); the window, counted from the query's own
            position, then limits what it sees of the context, never of the block.
        few: most of the B requests may have no queries, as in a step that was recorded for more of them than there are:
            work is parted as for the fewest that so many queries can be of.

    Returns:
        [T, H, dv] of q's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices, window or softcap do not fit; the message names the argument. The values of
            cu_q, context and page_table are not looked at on CUDA, which would wait for the device; there, positions
            beyond the table's or the cache's bounds are not seen.
    """
    _check(q, k_cells, v_cells, page_table, cu_q, context, page_size, window, softcap)
    arguments = (q, k_cells, v_cells, page_table, cu_q, context, page_size, scale, window, softcap, causal)
    if q.device.type == "cuda":
        from . import ragged_paged_attention_triton

        return ragged_paged_attention_triton.ragged_paged_attention(*arguments, few=few)
    _check_values(q, page_table, cu_q, context, page_size)
    return reference(*arguments)


def reference(
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
) -> Tensor:
    """`ragged_paged_attention` in torch, on any device, arguments unchecked: one request after the other, over its
    gathered keys and values, in float32."""
    tokens, heads, dim = q.shape
    kv_heads = k_cells.shape[0]
    out = q.new_zeros(tokens, heads, v_cells.shape[2])
    starts = cu_q.tolist()
    for b, past in enumerate(context.tolist()):
        rows = slice(starts[b], starts[b + 1])
        count = starts[b + 1] - starts[b]
        if not count:
            continue
        # Pages before every window may have gone to other requests: they are not touched.
        first = min(past, max(0, past - window + 1)) if window else 0
        at = torch.arange(first, past + count, device=q.device)
        cells = page_table[b, at // page_size].long() * page_size + at % page_size
        keys, values = (cache[:, cells].float() for cache in (k_cells, v_cells))
        own = torch.arange(past, past + count, device=q.device)[:, None]
        seen = at <= own if causal else torch.ones(count, len(at), dtype=torch.bool, device=q.device)
        if window:
            near = at > own - window
            seen = seen & (near if causal else near | (at >= past))
        grouped = q[rows].float().view(count, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("thgd,hnd->hgtn", grouped, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hgtn,hnv->thgv", weights, values).reshape(count, heads, -1).to(q.dtype)
    return out
