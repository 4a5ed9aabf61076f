"""`noise` in Triton: the same bits for the same key; uniforms and Gumbels of them to the last place or two.

Device functions only; the construction is explained in `noise`. uint32 arithmetic wraps by itself here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _absorb(state, word):
    """One lowbias32 round over `state ^ word`, uint32."""
    x = state ^ word
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(start, stream, seed, position):
    """One of the two keys of (stream, seed, position): stream int32, seed and position int64, any shape."""
    state = _absorb(start, stream.to(tl.uint32))
    state = _absorb(state, (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _absorb(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _absorb(state, (position & 0xFFFFFFFF).to(tl.uint32))
    return _absorb(state, ((position >> 32) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def bits(stream, seed, position, index):
    """uint32 noise bits of (seed, position, index, stream); index int32 or int64, shapes broadcast."""
    entry = _key(tl.full((), 0x243F6A88, tl.uint32), stream, seed, position)
    inner = _key(tl.full((), 0xB7E15162, tl.uint32), stream, seed, position)
    x = entry ^ index.to(tl.uint32)
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= inner
    x ^= x >> 11
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def uniform(stream, seed, position, index):
    """float32 uniforms in the open (0, 1)."""
    # 2^-32, and the largest float32 below one: bits near 2^32 round up to it.
    return tl.minimum((bits(stream, seed, position, index).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)


@triton.jit
def gumbel(stream, seed, position, index):
    """float32 standard Gumbel noise, -log(-log1p(-u)), finite."""
    u = uniform(stream, seed, position, index)
    # log1p is not in Triton's language. log(w) x / (w - 1) with w = 1 + x rounded is exact to an ulp or two, however
    # small x: the error of w is the same in both factors.
    rest = 1.0 - u
    survival = tl.where(rest == 1.0, -u, tl.log(rest) * (u / (1.0 - rest)))
    return -tl.log(-survival)
