"""The attention kernel agrees with plain float64 attention, reads nothing else and leaves nothing unwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftline_kernels import ragged_paged_attention, ragged_paged_attention_triton
from draftline_kernels.ragged_paged_attention import reference
from tests.kernels.attention_cases import batch_of, exact


def run(device: torch.device, case: dict[str, Any], splits: int = 1) -> torch.Tensor:
    """The kernel's result, in parts of as few positions as the splits ask for; what it allocates is poisoned."""
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.items()}

    def poisoned(*size: int, **kind: Any) -> torch.Tensor:
        return torch.full(size, float("nan"), **kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_paged_attention_triton.torch, "empty", poisoned)
        return ragged_paged_attention_triton.ragged_paged_attention(**moved, splits=splits, span=1).cpu()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 1.5)])
def test_mixed_requests(device: torch.device, splits: int, causal: bool, window: int, softcap: float) -> None:
    """Verification, a prefill chunk, no tokens at all, plain decoding; NaN wherever nobody may look."""
    requests = ((150, 3), (0, 9), (5, 0), (40, 1), (3, 4))
    case = batch_of(requests, window=window, softcap=softcap, causal=causal)
    torch.testing.assert_close(run(device, case, splits).double(), exact(case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1), (8, 1)])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (128, 64), (256, 256)])
def test_heads_and_dims(device: torch.device, heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    requests = ((9, 2), (0, 3))
    case = batch_of(requests, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, seed=dim + heads)
    torch.testing.assert_close(run(device, case).double(), exact(case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("window", "splits"), [(0, 2), (1, 1), (33, 2)])
def test_a_chunk_of_several_tiles(device: torch.device, window: int, splits: int) -> None:
    """More queries than a program takes: each tile's positions begin and end where its own queries' do, and some
    queries see nothing of the positions that are read first."""
    case = batch_of(((90, 70), (2, 1)), heads=8, kv_heads=1, window=window, page_size=16)
    torch.testing.assert_close(run(device, case, splits), reference(**case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("positions", [127, 128, 129, 257, 385])
def test_splits_cover_every_position(device: torch.device, positions: int) -> None:
    """Around whole tiles of 128 positions, in two and in more splits than there are tiles."""
    case = batch_of(((positions - 2, 2),), page_size=16)
    for splits in (2, 5):
        torch.testing.assert_close(run(device, case, splits), reference(**case), rtol=2e-5, atol=2e-5)


def test_strides(device: torch.device) -> None:
    """Caches with the cells outermost, queries that a model has by heads, a slice of a wider table."""
    case = batch_of(causal=False, window=5)
    wanted = exact(case)
    for name in ("q", "k_cells", "v_cells"):
        case[name] = case[name].transpose(0, 1).contiguous().transpose(0, 1)
    case["page_table"] = torch.cat((case["page_table"], torch.full((5, 3), 10**6, dtype=torch.int32)), 1)[:, :-3]
    torch.testing.assert_close(run(device, case, 2).double(), wanted, rtol=2e-5, atol=2e-5)


def test_more_requests_than_tokens(device: torch.device) -> None:
    """A step's shape that a graph was captured with: requests without tokens, rows that belong to nobody."""
    case = batch_of(((7, 0), (12, 2), (0, 0), (3, 1), (9, 0), (1, 0)))
    wanted = exact(case)
    case["q"] = torch.cat((case["q"], torch.full((4, 4, 16), float("nan"))))
    for splits in (1, 3):
        torch.testing.assert_close(run(device, case, splits)[:3].double(), wanted, rtol=2e-5, atol=2e-5)


def test_large_scores(device: torch.device) -> None:
    """Scores whose exponentials overflow, in every split."""
    case = batch_of(((60, 2),))
    case["q"] *= 100
    torch.testing.assert_close(run(device, case, 3).double(), exact(case), rtol=1e-3, atol=1e-3)


def test_half_precision(device: torch.device) -> None:
    case = batch_of(((40, 3), (0, 5)), dtype=torch.float16)
    torch.testing.assert_close(run(device, case, 2).double(), exact(case), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("bad", ["page id", "room"])
def test_what_is_out_of_bounds_is_not_seen(device: torch.device, bad: str) -> None:
    """Values that only the CPU checks: of 12 positions the last page's 4 are nowhere, so 8 are seen."""
    case = batch_of(((0, 12),), causal=False)
    cells = (case["page_table"][0, :2, None] * 4 + torch.arange(4)).flatten().long()
    k, v = (case[n][:, cells].repeat_interleave(2, 0) for n in ("k_cells", "v_cells"))
    weights = (torch.einsum("thd,hnd->thn", case["q"], k) * case["scale"]).softmax(-1)
    if bad == "page id":
        case["page_table"][0, 2] = 10**8
    else:
        case["page_table"] = case["page_table"][:, :2]
    wanted = torch.einsum("thn,hnv->thv", weights, v)
    torch.testing.assert_close(run(device, case), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 256)])
def test_on_the_gpu_as_on_the_cpu(causal: bool, dtype: torch.dtype, dim: int) -> None:
    """The public function at real sizes, both dispatches; few requests, so that it splits."""
    requests = ((3000, 8), (700, 5), (0, 300), (64, 0))
    common = {"heads": 16, "kv_heads": 4, "dim": dim, "page_size": 16, "causal": causal, "dtype": dtype}
    for more in ({}, {"window": 512, "softcap": 20.0}):
        case = batch_of(requests, **common, **more)
        moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in case.items()}
        loose = 1e-4 if dtype == torch.float32 else 2e-2
        got, wanted = ragged_paged_attention(**moved).cpu(), ragged_paged_attention(**case)
        torch.testing.assert_close(got, wanted, rtol=loose, atol=loose)
