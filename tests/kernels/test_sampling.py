"""Transformed logits are transformers' own; draws follow softmax exactly and share their noise over vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from draftline_kernels import BLOCK, Sampling, at_once, draw, transfer, transform
from tests.statistical.chi_square import p_value


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores


@pytest.mark.parametrize("width", [7, 300, 6000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.3, 0, 0.5, 0.0),
        (0.8, 40, 0.95, 0.0),
        (1.0, 1, 0.3, 0.0),
        (0.7, 0, 1.0, 0.1),
        (1.0, 0, 1.0, 1.0),
        (1.5, 3, 1.0, 0.02),
        (1.5, 200, 1.0, 0.02),
        (2.0, 0, 0.9, 0.1),
        (1.5, 5, 0.7, 0.05),
    ],
)
def test_transform_is_transformers_warpers(
    width: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    torch.manual_seed(width)
    logits = torch.randn(6, width) * 3
    own = Sampling.of([(temperature, top_k, top_p, 0, min_p)] * len(logits))
    got = transform(logits, own.temperature, own.top_k, own.top_p, own.min_p)
    wanted = warped(logits, temperature, min(top_k, width), top_p, min_p)
    assert torch.equal(got.isinf(), wanted.isinf())
    torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1), atol=1e-6, rtol=1e-5)


def test_rows_keep_their_own_settings() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 500)
    settings = [(0.0, 3, 0.5, 0.2), (1.0, 0, 1.0, 0.0), (0.6, 10, 1.0, 0.0), (2.0, 0, 0.8, 0.3)]
    own = Sampling.of([(*s[:3], 0, s[3]) for s in settings])
    got = transform(logits, own.temperature, own.top_k, own.top_p, own.min_p)
    assert got[0].argmax() == logits[0].argmax() and int(got[0].isfinite().sum()) == 1
    for row in (1, 2, 3):
        wanted = warped(logits[row : row + 1], *settings[row])[0]
        torch.testing.assert_close(got[row].softmax(-1), wanted.softmax(-1), atol=1e-6, rtol=1e-5)


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    one = torch.ones(1)
    assert transform(logits, one * 0, torch.tensor([0]), one).argmax() == 1, "greedy: the lowest id"
    kept = transform(logits, one, torch.tensor([2]), one).isfinite()[0].tolist()
    assert kept == [False, True, True, True, False], "top-k keeps what ties with the k-th, as transformers does"
    kept = transform(logits, one, torch.tensor([0]), torch.tensor([0.5])).isfinite()[0].tolist()
    assert kept == [False, True, True, False, False], "top-p takes the lowest ids of a tie"
    kept = transform(logits, one, torch.tensor([0]), one, one).isfinite()[0].tolist()
    assert kept == [False, True, True, True, False], "min-p keeps what is as likely as it asks"


def test_a_copy_holds_each_tensor_where_triton_expects_it() -> None:
    """At multiples of 16 bytes, whatever their sizes: a kernel would be compiled anew for each other place."""
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(3, generator=g),
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3).T,
        torch.zeros(0, dtype=torch.int64),
        torch.randn(2, 5, generator=g).bfloat16(),
    ]
    packed = torch.zeros(sum(-(-t.numel() * t.element_size() // 16) * 16 for t in parts), dtype=torch.uint8)
    transfer.pack(parts, packed)
    for part, copy in zip(parts, transfer.views(parts, packed), strict=True):
        assert copy.dtype == part.dtype and torch.equal(copy, part) and copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(parts, at_once(parts, "cpu"), strict=True))
    assert [t.device.type for t in at_once(parts, "meta")] == ["meta"] * len(parts)


def test_what_a_batch_asks_for_is_known_without_its_tensors() -> None:
    """As of the tensors: on a GPU those would have to be waited for."""
    greedy, plain = (0.0, 5, 0.5, 1, 0.1), (1.0, 0, 1.0, 2)
    for rows, wanted in (
        ([greedy], (True, False)),
        ([greedy, plain], (False, False)),
        ([greedy, (1.0, 0, 1.0, 3, 0.1)], (False, True)),
        ([(0.5, 0, 0.9, 3), plain], (False, True)),
        ([(0.5, 3, 1.0, 3)], (False, True)),
        ([], (True, False)),
    ):
        own = Sampling.of(rows)
        assert (own.greedy, own.truncated) == wanted, rows
        told = Sampling(own.temperature, own.top_k, own.top_p, own.seed, own.min_p)
        assert (told.greedy, told.truncated) == wanted, rows
    on_meta = Sampling.of([greedy, plain], "meta")  # where no value can be looked at
    assert not on_meta.greedy and on_meta.min_p.device.type == "meta"
    some = Sampling.of([greedy, plain]).select(torch.tensor([0, 0]))
    assert some.greedy and len(some) == 2 and Sampling.of([greedy] * 2).select(torch.tensor([1])).greedy


@pytest.mark.parametrize("width", [6, BLOCK + 50, 3 * BLOCK])
def test_draws_follow_softmax(width: int) -> None:
    """Categories cover one block, a block edge and several blocks."""
    torch.manual_seed(width)
    logits = torch.full((width,), -9.0)
    heavy = torch.linspace(0, width - 1, 6).long()
    logits[heavy] = torch.randn(6)
    n = 200_000 if width == 6 else 30_000
    picked = torch.zeros(width, dtype=torch.int64)
    for start in range(0, n, 2000):
        seeds = torch.arange(start, start + 2000)
        tokens = draw(logits.expand(2000, -1), seeds, torch.full((2000,), 17))
        picked += torch.bincount(tokens, minlength=width)
    probability = logits.double().softmax(-1)
    light = torch.ones(width, dtype=torch.bool)
    light[heavy] = False
    counts = torch.cat((picked[heavy], picked[light].sum()[None]))
    exact = torch.cat((probability[heavy], probability[light].sum()[None]))
    if width == 6:
        counts, exact = counts[:-1], exact[:-1]
    assert p_value(counts, exact) > 1e-4


def test_a_draft_vocabulary_meets_the_same_noise() -> None:
    """Equal distributions that live on a subset draw equal tokens: the coupling needs no common vocabulary."""
    torch.manual_seed(0)
    width = 2 * BLOCK + 100
    d2t = torch.randperm(width)[:700].sort().values
    own = torch.randn(400, 700) * 2
    full = torch.full((400, width), float("-inf"))
    full[:, d2t] = own
    seed, position = torch.arange(400), torch.arange(400) % 13
    assert torch.equal(draw(own, seed, position, d2t), draw(full, seed, position))


def test_coupling_keeps_at_least_its_bound() -> None:
    """Two distributions at total variation t agree at least (1 - t) / (1 + t) of the time."""
    torch.manual_seed(0)
    p = torch.randn(30)
    q = p + torch.randn(30) * 0.5
    t = 0.5 * float((p.softmax(-1) - q.softmax(-1)).abs().sum())
    seed, position = torch.arange(40_000), torch.zeros(40_000, dtype=torch.int64)
    same = (draw(p.expand(40_000, -1), seed, position) == draw(q.expand(40_000, -1), seed, position)).double().mean()
    assert (1 - t) / (1 + t) - 0.01 < float(same) <= 1 - t + 0.01


def test_other_streams_are_independent_noise() -> None:
    logits = torch.zeros(20_000, 10)
    seed, position = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    same = draw(logits, seed, position) == draw(logits, seed, position, stream="draft")
    assert abs(float(same.double().mean()) - 0.1) < 0.012


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((-1.0, 0, 1.0, 0), "temperature -1.0"),
        ((1.0, -2, 1.0, 0), "top_k -2"),
        ((1.0, 0, 1.5, 0), "top_p 1.5"),
        ((1.0, 0, 1.0, 0, -0.1), "min_p -0.1"),
    ],
)
def test_bad_sampling_is_named(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling.of([row])


def test_the_coupled_stream_is_keyed_by_position_alone() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="position alone"):
        draw(torch.zeros(1, 4), one, one, anchor=one)
