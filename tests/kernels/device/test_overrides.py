"""The verification kernels read bias and penalties in place of the target's logits: decisions are those of the
reference and of a dense computation in float64."""

from __future__ import annotations

import pytest
import torch

from draftline_kernels import BLOCK, Adjustment, Overrides, Sampling, VerifyResult, touched, verify, verify_triton
from tests.kernels.override_cases import ASKS, HOT, LENGTHS, WIDTH, Case, same


def decided(device: torch.device, case: Case) -> VerifyResult:
    """By the kernels, as the reference and dense logits have it; the target's logits stay."""
    arguments = case.arguments(device)
    before = arguments["target_logits"].clone()
    got = verify_triton.verify(**arguments)
    assert torch.equal(arguments["target_logits"].nan_to_num(), before.nan_to_num())
    assert arguments["target_logits"].dtype == before.dtype
    assert same(got, verify(**case.arguments())), "the reference"
    assert same(got, case.dense()), "dense logits"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asks", ASKS)
def test_coupled_tokens(device: torch.device, asks: str, dtype: torch.dtype) -> None:
    result = decided(device, Case("coupled", asks, dtype))
    assert int(result.accepted.max()) > 0 and bool((result.accepted.cpu() < torch.tensor(LENGTHS)).any())


@pytest.mark.parametrize(
    ("asks", "vocabulary", "dtype"),
    [
        ("plain", "whole", torch.float32),
        ("mixed", "draft", torch.float32),
        ("narrowed", "one-hot", torch.bfloat16),
    ],
)
def test_ratio_tokens(device: torch.device, asks: str, vocabulary: str, dtype: torch.dtype) -> None:
    others = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:500]
    d2t = torch.cat((others, torch.tensor(HOT))).unique() if vocabulary == "draft" else None
    for seed in range(2):
        case = Case("ratio", asks, dtype, d2t, seed)
        case.certain = vocabulary == "one-hot"
        decided(device, case)


def test_penalties_of_every_request(device: torch.device) -> None:
    case = Case("ratio", "mixed")
    case.adjustments = [Adjustment(1.4, 0.2, 1.0, {BLOCK: 1.0})] * len(LENGTHS)
    decided(device, case)


def test_a_block_of_which_every_token_is_touched(device: torch.device) -> None:
    case = Case("coupled", "narrowed")
    case.adjustments[4] = Adjustment(1.2, bias={token: token % 7 / 3 for token in range(BLOCK + 2)})
    decided(device, case)


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_rows_that_are_not_finite(device: torch.device, rule: str) -> None:
    """A NaN in a touched token, one in an untouched one, and a request of whose rows one is -inf throughout."""
    case = Case(rule, "mixed")
    first = [int(case.cumulative[b]) for b in (1, 4, 7)]
    case.logits[first[0], BLOCK] = case.logits[first[1], 11] = float("nan")
    case.logits[first[2]] = float("-inf")
    assert decided(device, case).finite.tolist() == [b not in (1, 4, 7) for b in range(8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_on_the_gpu_as_on_the_cpu(rule: str) -> None:
    """The public function, with nothing that waits for the device between what is asked and what is decided."""
    case = Case(rule, "mixed", torch.bfloat16)
    wanted = verify(**case.arguments())
    arguments = case.arguments("cuda")
    verify(**arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling = Sampling.of([(*ask[:3], 31 * b, ask[3]) for b, ask in enumerate(case.asks)], "cuda")
        got = verify(**arguments | {"sampling": sampling, "overrides": case.overrides("cuda")})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_entries_on_the_gpu() -> None:
    """Some 4,000 touched tokens of Qwen3's vocabulary in each request, most in its first blocks."""
    g = torch.Generator().manual_seed(3)
    width, rows = 151_936, [4, 1, 3]
    logits = (torch.randn(sum(rows), width, generator=g) * 3).bfloat16()
    tokens = torch.randint(0, 500, (3, 3), generator=g)
    parts = [
        touched(
            Adjustment(1.2, 0.3, 0.5, {width - 1: 5.0}),
            prompt=(torch.rand(4800, generator=g) ** 3 * width).long().tolist(),
            answer=tokens.flatten().tolist(),
            proposed=tokens[b, : n - 1].tolist(),
            vocabulary=width,
        )
        for b, n in enumerate(rows)
    ]

    def on(device: str) -> VerifyResult:
        return verify(
            logits.to(device),
            tokens.to(device),
            torch.tensor(rows, device=device) - 1,
            torch.tensor([0, 4, 5, 8], device=device),
            Sampling.of([(0.0, 0, 1.0, 0), (1.0, 0, 1.0, 1), (0.9, 50, 0.95, 2, 0.02)], device),
            torch.tensor([7, 8, 9], device=device),
            overrides=Overrides.of(parts, rows, width, device),
        )

    assert same(on("cuda"), on("cpu"))
