"""The device's noise is the documented function of its key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from draftline_kernels import noise, noise_triton


@triton.jit
def _fill(stream, seeds, positions, ids, bits, uniforms, gumbels, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    seed, position, index = tl.load(seeds + at), tl.load(positions + at), tl.load(ids + at)
    kind = tl.load(stream + at)
    tl.store(bits + at, noise_triton.bits(kind, seed, position, index).to(tl.int64))
    tl.store(uniforms + at, noise_triton.uniform(kind, seed, position, index))
    tl.store(gumbels + at, noise_triton.gumbel(kind, seed, position, index))


def test_bits_are_equal_and_gumbels_agree(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    n = 4096
    seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=g)
    position = torch.randint(0, 2**62, (n,), generator=g)
    index = torch.randint(0, 2**31 - 1, (n,), generator=g)
    stream = torch.randint(0, 9, (n,), generator=g).to(torch.int32)
    seed[:3], position[:3], index[:3] = torch.tensor([0, -1, 2**63 - 1]), 0, torch.tensor([0, 2**31 - 1, 5])
    bits = torch.zeros(n, dtype=torch.int64, device=device)
    uniforms, gumbels = torch.zeros(n, device=device), torch.zeros(n, device=device)
    inputs = [t.to(device) for t in (stream, seed, position, index)]
    _fill[(1,)](*inputs, bits, uniforms, gumbels, COUNT=n)
    assert torch.equal(bits.cpu(), noise.bits(seed, position, index, stream))
    assert torch.equal(uniforms.cpu(), noise.uniform(seed, position, index, stream))
    exact = -torch.log(-torch.log1p(-noise.uniform(seed, position, index, stream).double()))
    torch.testing.assert_close(gumbels.cpu().double(), exact, rtol=3e-7, atol=3e-7)


@triton.jit
def _of_uniforms(u_in, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    u = tl.load(u_in + at)
    rest = 1.0 - u
    tl.store(out + at, tl.where(rest == 1.0, -u, tl.log(rest) * (u / (1.0 - rest))))


def test_small_uniforms_keep_their_gumbel(device: torch.device) -> None:
    """The upper tail, which decides every draw: log1p must not lose what 1 - u rounds away."""
    u = torch.tensor([2.0**-33, 3e-10, 1e-8, 5.9e-8, 6.1e-8, 1e-7, 1e-4, 0.99999994]).to(device)
    out = torch.zeros_like(u)
    _of_uniforms[(1,)](u, out, COUNT=8)
    torch.testing.assert_close(out.double(), torch.log1p(-u.double()), rtol=3e-7, atol=0)
