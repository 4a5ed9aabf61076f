"""The verification kernels decide as the reference does, token for token, under both rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from draftline_kernels import BLOCK, Sampling, VerifyResult, draw, proposal_stream, transform, verify, verify_triton

Ask = tuple[float, int, float] | tuple[float, int, float, float]
"""Temperature, top_k, top_p and, where it is on, min_p."""

GREEDY = (0.0, 0, 1.0)
PLAIN = (1.0, 0, 1.0)
ASKS: dict[str, list[Ask]] = {
    "greedy": [GREEDY],
    "plain": [PLAIN, (0.7, 0, 1.0)],
    "top-k": [(1.0, 5, 1.0), (0.8, 300, 1.0)],
    "top-p": [(1.0, 0, 0.9), (1.3, 0, 0.5), (1.0, 0, 0.0)],
    "min-p": [(1.0, 0, 1.0, 0.05), (1.5, 6, 1.0, 0.02), (1.5, 0, 0.8, 0.02), (1.3, 30, 0.9, 0.2), (1.0, 0, 1.0, 1.0)],
    "mixed": [GREEDY, PLAIN, (0.8, 40, 0.95), (1.0, 0, 0.8), (2.0, 1, 1.0), (0.6, 10**6, 1.0), (0.9, 0, 0.9, 0.1)],
}


def sampling_of(asks: Sequence[Ask], seeds: Sequence[int]) -> Sampling:
    """Of as many requests as seeds, which ask in turn."""
    turns = (asks[b % len(asks)] for b in range(len(seeds)))
    return Sampling.of([(*ask[:3], seed, *ask[3:]) for ask, seed in zip(turns, seeds, strict=True)])


def moved(sampling: Sampling, device: torch.device | str) -> Sampling:
    """Elsewhere."""
    return Sampling(*(getattr(sampling, f).to(device) for f in ("temperature", "top_k", "top_p", "seed", "min_p")))


def batch_of(
    rule: str, asks: Sequence[Ask], width: int, d2t: torch.Tensor | None = None, block: int = 3
) -> dict[str, Any]:
    """A ragged batch whose proposals a draft near the target drew, so that every accepted count occurs."""
    g = torch.Generator().manual_seed(width + len(asks))
    requests = 8
    lengths = torch.arange(requests, 0, -1) % (block + 1)
    cumulative = torch.cat((torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)))
    target = torch.randn(int(cumulative[-1]), width, generator=g) * 5
    sampling = sampling_of(asks, [31 * b for b in range(requests)])
    positions = torch.randint(0, 5000, (requests,), generator=g)
    columns = torch.arange(width) if d2t is None else d2t
    if d2t is not None:
        target[:, d2t] += 8.0  # a draft vocabulary holds the likely tokens
    tokens = torch.zeros(requests, block, dtype=torch.int64)
    q = torch.randn(requests, block, len(columns), generator=g)
    for b in range(requests):
        for k in range(int(lengths[b])):
            near = target[cumulative[b] + k, columns][None] + (2.5 if k else 0.1) * torch.randn(
                1, len(columns), generator=g
            )
            one = sampling.select(torch.tensor([b]))
            q[b, k] = transform(near, one.temperature, one.top_k, one.top_p, one.min_p)
            at = positions[b : b + 1]
            anchor = at if rule == "ratio" else None
            stream = proposal_stream(rule)
            tokens[b, k] = draw(q[b, k][None], one.seed, at + 1 + k, d2t, stream=stream, anchor=anchor)
    return {
        "target_logits": target,
        "tokens": tokens,
        "lengths": lengths,
        "cu_lengths": cumulative,
        "sampling": sampling,
        "positions": positions,
        "rule": rule,
        "draft_logits": q if rule == "ratio" else None,
        "d2t": d2t,
    }


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Sampling):
            return moved(value, device)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in batch.items()}


def compare(device: torch.device, batch: dict[str, Any]) -> VerifyResult:
    wanted = verify(**batch)
    got = verify_triton.verify(**{"overrides": None, **on(device, batch)})
    for name in ("finite", "accepted", "next_token"):
        assert getattr(got, name).tolist() == getattr(wanted, name).tolist(), name
    return wanted


@pytest.mark.parametrize(
    ("asks", "width"), [*((a, 50) for a in ASKS), *((a, 2 * BLOCK + 77) for a in ("plain", "min-p", "mixed"))]
)
def test_coupled_tokens_are_the_references(device: torch.device, asks: str, width: int) -> None:
    batch = batch_of("coupled", ASKS[asks], width)
    result = compare(device, batch)
    assert int(result.accepted.max()) > 0 and bool((result.accepted < batch["lengths"]).any())


@pytest.mark.parametrize("asks", ["plain", "mixed"])
@pytest.mark.parametrize("vocabulary", ["whole", "draft", "one-hot"])
def test_ratio_tokens_are_the_references(device: torch.device, asks: str, vocabulary: str) -> None:
    """q over the whole vocabulary, over a draft vocabulary, and unknown (the proposal taken as certain)."""
    width = BLOCK + 300
    d2t = torch.randperm(width, generator=torch.Generator().manual_seed(1))[:900].sort().values
    batch = batch_of("ratio", ASKS[asks], width, d2t if vocabulary == "draft" else None)
    if vocabulary == "one-hot":
        batch["draft_logits"] = None
    result = compare(device, batch)
    assert int(result.accepted.max()) > 0 and bool((result.accepted < batch["lengths"]).any())


def test_ties_and_minus_infinity(device: torch.device) -> None:
    """Logits on a coarse grid: edges of top-k and top-p fall into ties, and half of the vocabulary is impossible."""
    batch = batch_of("coupled", [(1.0, 7, 1.0), (1.0, 0, 0.7), (1.0, 30, 0.5), (1.0, 0, 0.6, 0.3), GREEDY, PLAIN], 700)
    coarse = batch["target_logits"].div(2).round()
    coarse[:, 1::2] = float("-inf")
    coarse[coarse == 0] *= -1.0  # -0 and 0 are one value
    coarse[3:] = coarse[3:].clamp(max=1.0)
    batch["target_logits"] = coarse
    compare(device, batch)


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spares_the_others(device: torch.device, rule: str, value: float) -> None:
    batch = batch_of(rule, ASKS["mixed"], 90)
    rows = [int(batch["cu_lengths"][b + 1]) - 1 for b in (0, 5, 7)]
    if value == float("-inf"):
        batch["target_logits"][rows] = value
    else:
        batch["target_logits"][rows, 3] = value
    result = compare(device, batch)
    assert result.finite.tolist() == [b not in (0, 5, 7) for b in range(8)]


def test_draft_rows_that_cannot_be_right_count_as_certain(device: torch.device) -> None:
    """A NaN row of q, and one that gives its own token no mass."""
    batch = batch_of("ratio", [PLAIN], 120)
    full = (batch["lengths"] > 0).nonzero().squeeze(-1)
    batch["draft_logits"][full[0]] = float("nan")
    batch["draft_logits"][full[1], torch.arange(3), batch["tokens"][full[1]]] = float("-inf")
    compare(device, batch)


def test_no_residual_draws_from_the_target(device: torch.device) -> None:
    """p lives on one token, which the draft never proposes: max(p - q, 0) is p, whatever q."""
    batch = batch_of("ratio", [PLAIN], 40)
    batch["target_logits"] = torch.full_like(batch["target_logits"], float("-inf"))
    batch["target_logits"][:, 11] = 0.0
    result = compare(device, batch)
    assert set(result.next_token.tolist()) == {11}


def test_bfloat16_logits(device: torch.device) -> None:
    batch = batch_of("coupled", ASKS["mixed"], 600)
    batch["target_logits"] = batch["target_logits"].bfloat16()
    compare(device, batch)


def test_rows_may_lie_apart(device: torch.device) -> None:
    """A slice of a wider buffer, as a padded lm_head's output is."""
    batch = batch_of("coupled", ASKS["plain"], 90)
    wide = torch.full((len(batch["target_logits"]), 128), float("nan"))
    wide[:, :90] = batch["target_logits"]
    batch["target_logits"] = wide[:, :90]
    compare(device, batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_on_the_gpu_as_on_the_cpu(rule: str) -> None:
    """The public function at Qwen3's vocabulary: a seed's text is the same on both devices."""
    batch = batch_of(rule, ASKS["mixed"], 151_936)
    wanted, got = verify(**batch), verify(**on(torch.device("cuda"), batch))
    assert got.accepted.tolist() == wanted.accepted.tolist()
    assert got.next_token.tolist() == wanted.next_token.tolist()
