"""Ragged batches over a shuffled paged cache, and plain attention in float64 to hold results against."""

from __future__ import annotations

import math
from typing import Any

import torch

MIXED = ((17, 4), (0, 9), (5, 0), (40, 1), (3, 4))
"""(context, new tokens) of each request: verification, a prefill chunk, one without tokens, plain decoding."""


def batch_of(
    requests: tuple[tuple[int, int], ...] = MIXED,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int = 0,
    page_size: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ragged_paged_attention`; whatever no query of a request may see is NaN in the cache and, a whole
    page of it, an id out of range in the table.

    Args:
        value_dim: dim of a value; 0: `dim`.
    """
    g = torch.Generator().manual_seed(seed)
    counts = [count for _, count in requests]
    pages = max(math.ceil((past + count) / page_size) for past, count in requests) + 1
    total = len(requests) * pages + 3
    ids = torch.randperm(total, generator=g)
    table = torch.full((len(requests), pages), -1, dtype=torch.int32)
    k, v = (torch.full((kv_heads, total * page_size, n), float("nan")) for n in (dim, value_dim or dim))
    for b, (past, count) in enumerate(requests):
        first = min(past, max(0, past - window + 1)) if window else 0
        for p in range(first, past + count):
            page = ids[b * pages + p // page_size]
            table[b, p // page_size] = page
            for cache in (k, v):
                cache[:, page * page_size + p % page_size] = torch.randn(kv_heads, cache.shape[2], generator=g)
    return {
        "q": torch.randn(sum(counts), heads, dim, generator=g).to(dtype),
        "k_cells": k.to(dtype),
        "v_cells": v.to(dtype),
        "page_table": table,
        "cu_q": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        "context": torch.tensor([past for past, _ in requests], dtype=torch.int32),
        "page_size": page_size,
        "scale": dim**-0.5,
        "window": window,
        "softcap": softcap,
        "causal": causal,
    }


def exact(a: dict[str, Any]) -> torch.Tensor:
    """float64 [T, H, dv], one query and head at a time, from the definition."""
    q, k, v = (a[n].double() for n in ("q", "k_cells", "v_cells"))
    groups = q.shape[1] // k.shape[0]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for b, past in enumerate(a["context"].tolist()):
        start, stop = a["cu_q"][b : b + 2].tolist()
        for j in range(stop - start):
            own = past + j
            seen = []
            for p in range(own + 1 if a["causal"] else past + stop - start):
                near = not a["window"] or p > own - a["window"]
                if near or (not a["causal"] and p >= past):
                    page = int(a["page_table"][b, p // a["page_size"]])
                    seen.append(page * a["page_size"] + p % a["page_size"])
            for h in range(q.shape[1]):
                scores = k[h // groups, seen] @ q[start + j, h] * a["scale"]
                if a["softcap"]:
                    scores = a["softcap"] * torch.tanh(scores / a["softcap"])
                out[start + j, h] = scores.softmax(0) @ v[h // groups, seen]
    return out
