"""The noise is the documented function of its key, uniform, and independent over keys."""

from __future__ import annotations

import numpy as np
import torch

from draftline_kernels import noise

WORD = 0xFFFFFFFF


def lowbias(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def reference(seed: int, position: int, index: int, stream: int) -> int:
    """The documented construction in plain unsigned integers."""
    keys = []
    for state in (0x243F6A88, 0xB7E15162):
        for word in (stream & WORD, seed & WORD, seed >> 32 & WORD, position & WORD, position >> 32 & WORD):
            state = lowbias(state ^ word)
        keys.append(state)
    x = keys[0] ^ index
    x ^= x >> 17
    x = x * 0xED5AD4BB & WORD
    x ^= keys[1]
    x ^= x >> 11
    x = x * 0xAC4C1B51 & WORD
    x ^= x >> 15
    x = x * 0x31848BAB & WORD
    return x ^ x >> 14


def test_bits_equal_the_unsigned_reference() -> None:
    random = np.random.default_rng(0)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), *random.integers(-(2**62), 2**62, 40).tolist()]
    positions = [0, 1, 2**31 - 1, 5 | 7 << 32, 3, *random.integers(0, 2**31, 40).tolist()]
    indices = [0, 1, 2**31 - 1, 151_935, 4, *random.integers(0, 2**31, 40).tolist()]
    streams = [0, 1, 2, 8, 5, *random.integers(0, 9, 40).tolist()]
    got = noise.bits(*map(torch.tensor, (seeds, positions, indices, streams)))
    wanted = [
        reference(s & (1 << 64) - 1, p, i, t) for s, p, i, t in zip(seeds, positions, indices, streams, strict=True)
    ]
    assert got.tolist() == wanted


def test_golden_values_never_change() -> None:
    """Texts of a seed are a promise: these bits were computed once, by the reference above."""
    got = noise.bits(torch.tensor([0, 7, 7]), torch.tensor([0, 3, 4]), torch.tensor([0, 11, 11]), 0)
    assert got.tolist() == [reference(0, 0, 0, 0), reference(7, 3, 11, 0), reference(7, 4, 11, 0)]
    assert got.tolist() == [3446161530, 374366356, 1511941577]


def test_uniforms_are_open_and_uniform() -> None:
    u = noise.uniform(torch.tensor([5]), torch.tensor([9]), torch.arange(1 << 20), 0).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    # Kolmogorov-Smirnov: sqrt(n) D above 1.95 has probability 0.001.
    ordered = u.sort().values
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert float((ordered - rank).abs().max()) * len(ordered) ** 0.5 < 1.95


def test_extreme_bits_stay_finite() -> None:
    edge = torch.tensor([0, 1, -1, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    u, g = noise.uniform_from_bits(edge), noise.gumbel_from_bits(edge)
    assert bool(((u > 0) & (u < 1)).all()) and bool(g.isfinite().all())


def test_neighbouring_keys_are_uncorrelated() -> None:
    """Seeds, positions, streams and ids that differ by one give independent noise."""
    n = 1 << 16
    index = torch.arange(n)
    base = noise.uniform(torch.tensor([3]), torch.tensor([10]), index, 0).double() - 0.5
    for seed, position, stream, shift in ((4, 10, 0, 0), (3, 11, 0, 0), (3, 10, 1, 0), (3, 10, 0, 1), (2, 10, 0, 1)):
        other = noise.uniform(torch.tensor([seed]), torch.tensor([position]), index + shift, stream).double() - 0.5
        correlation = float((base * other).mean() * 12)
        assert abs(correlation) < 4.5 / n**0.5, (seed, position, stream, shift)


def test_a_row_does_not_depend_on_its_batch() -> None:
    seed, position, index = torch.arange(8), torch.arange(8) * 3, torch.arange(50)
    together = noise.gumbel(seed[:, None], position[:, None], index, 2)
    for row in range(8):
        alone = noise.gumbel(seed[row : row + 1], position[row : row + 1], index, 2)
        assert torch.equal(together[row], alone)
