"""The reference of attention over pages is its definition, and what it is given is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftline_kernels import ragged_paged_attention
from tests.kernels.attention_cases import batch_of, exact


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 0.0), (2, 1.5), (100, 0.0), (0, 1.5)])
def test_the_definition(causal: bool, window: int, softcap: float) -> None:
    """Random tables, mixed lengths; NaN wherever nobody may look."""
    case = batch_of(window=window, softcap=softcap, causal=causal)
    torch.testing.assert_close(ragged_paged_attention(**case).double(), exact(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (6, 2), (5, 1), (14, 2), (8, 1)])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (128, 64), (256, 256), (72, 40)])
def test_heads_and_dims(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    requests = ((9, 2), (0, 3))
    case = batch_of(requests, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, seed=dim + heads)
    got = ragged_paged_attention(**case)
    assert got.shape == (5, heads, value_dim)
    torch.testing.assert_close(got.double(), exact(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_page_sizes_and_strides(page_size: int) -> None:
    """Caches with the cells outermost, queries that a model has by heads."""
    case = batch_of(page_size=page_size, causal=False, window=5)
    wanted = exact(case)
    case["q"] = case["q"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("k_cells", "v_cells"):
        case[name] = case[name].transpose(0, 1).contiguous().transpose(0, 1)
    got = ragged_paged_attention(**case)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    case = batch_of(dtype=dtype)
    got = ragged_paged_attention(**case)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact(case).to(dtype), rtol=1e-2, atol=1e-5)


def test_nothing_to_attend() -> None:
    case = batch_of(((4, 0), (0, 0)))
    assert ragged_paged_attention(**case).shape == (0, 4, 16)
    case |= {"page_table": torch.zeros(0, 2, dtype=torch.int32), "context": torch.zeros(0, dtype=torch.int32)}
    case["cu_q"] = torch.zeros(1, dtype=torch.int32)
    assert ragged_paged_attention(**case).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(18, 64)}, "q is torch.float32 [18, 64]"),
        ({"q": torch.zeros(18, 4, 16, dtype=torch.float64)}, "q is torch.float64"),
        ({"q": torch.zeros(18, 5, 16)}, "5 heads, not a multiple of the 2 KV heads"),
        ({"k_cells": torch.zeros(2, 8, 16, dtype=torch.float16)}, "k_cells is torch.float16"),
        ({"k_cells": torch.zeros(2, 8, 12)}, "k_cells has dim 12, q has 16"),
        ({"v_cells": torch.zeros(2, 8, 16)}, "v_cells has [2, 8] KV heads and cells"),
        ({"page_table": torch.zeros(5, dtype=torch.int32)}, "page_table has shape [5]"),
        ({"page_table": torch.zeros(5, 9, dtype=torch.int64)}, "page_table is torch.int64"),
        ({"cu_q": torch.zeros(5, dtype=torch.int32)}, "cu_q has shape [5]; expected [6]"),
        ({"context": torch.zeros(5, dtype=torch.int64)}, "context is torch.int64"),
        ({"context": torch.full((5,), 70, dtype=torch.int32)}, "request 0 has 70 positions of context and 74 in all"),
        ({"cu_q": torch.tensor([0, 4, 2, 2, 3, 7], dtype=torch.int32)}, "never fall"),
        ({"cu_q": torch.tensor([0, 4, 9, 9, 9, 19], dtype=torch.int32)}, "within the 18 rows"),
        ({"page_size": 5}, "page_size 5"),
        ({"window": -1}, "window -1"),
        ({"softcap": -1.0}, "softcap -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ragged_paged_attention(**{**batch_of(), **change})
    assert message in str(caught.value)
