"""Counter-based noise: the same number for the same key on every device, in every batch, in any order.

`bits(seed, position, index, stream)` is a pure function of its four words, so a draw needs no generator state: two
processes, or a CPU and a GPU, that agree on the key agree on the noise. Every operation is one that uint32 arithmetic
has (xor, logical shift, wrapping product), so a Triton kernel reproduces the bits exactly; torch has no uint32
arithmetic on every device, hence int32 with wrapping products and shifts whose sign bits are masked away.

Construction: (stream, seed, position) are absorbed one 32-bit word at a time into two independent 32-bit keys by
lowbias32 rounds; the index passes a triple32 permutation (both: Wellons, "hash-prospector") that takes one key at its
entry and the other behind its first product. One 32-bit key would make the noise of some pairs of rows a permutation
of each other (keys that differ in few low bits); two keys leave no such pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Start values of the two keys: fractional digits of pi and of e, so that neither is in reach of a small stream number.
_KEY_STARTS = (0x243F6A88, 0xB7E15162)
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def _signed(word: int) -> int:
    """The int32 whose bit pattern is the uint32 `word`."""
    return word - (1 << 32) if word >= 1 << 31 else word


_LOWBIAS = (_signed(0x7FEB352D), _signed(0x846CA68B))
_TRIPLE = (_signed(0xED5AD4BB), _signed(0xAC4C1B51), _signed(0x31848BAB))


def _fold(word: Tensor, shift: int) -> Tensor:
    """`word ^= word >>> shift` in place; the mask turns int32's arithmetic shift into a logical one."""
    return word.bitwise_xor_((word >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    """One lowbias32 round over `state ^ word`; int32 in, int32 out, shapes broadcast."""
    mixed = state ^ word
    _fold(mixed, 16).mul_(_LOWBIAS[0])
    _fold(mixed, 15).mul_(_LOWBIAS[1])
    return _fold(mixed, 16)


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of an int64 tensor, as int32 with the same bit patterns."""
    value = value.to(torch.int64)
    low = value & 0xFFFFFFFF
    # Conversions of out-of-range integers are left to the platform by C++: bring the low word into int32's range first.
    low = torch.where(low >= 1 << 31, low - (1 << 32), low)
    return low.to(torch.int32), (value >> 32).to(torch.int32)


def keys(seed: Tensor, position: Tensor, stream: Tensor | int) -> Tensor:
    """The two 32-bit keys of (seed, position, stream): what is left to mix afterwards is only the index.

    Args:
        seed: int64, any shape: all 64 bits count.
        position: int64, broadcastable with `seed`: all 64 bits count.
        stream: int or int tensor, broadcastable: low 32 bits count.

    Returns:
        int32 [2, *shape]: bit patterns of the entry key and of the inner key.
    """
    device = seed.device
    stream = torch.as_tensor(stream, dtype=torch.int64, device=device)
    shape = torch.broadcast_tensors(seed, position, stream)[0].shape
    state = torch.tensor([_signed(start) for start in _KEY_STARTS], dtype=torch.int32, device=device)
    state = state.reshape(2, *([1] * len(shape)))
    seed_low, seed_high = _words(seed)
    position_low, position_high = _words(position)
    for word in (_words(stream)[0], seed_low, seed_high, position_low, position_high):
        state = _absorb(state, word)
    return state


def bits_from_keys(key: Tensor, index: Tensor) -> Tensor:
    """The last mixing step: int32 noise bits of `index` under `keys`.

    Args:
        key: int32 [2, *shape] from `keys`.
        index: int32 or int64, broadcastable with `shape`; values in [0, 2^31).

    Returns:
        int32, broadcast shape: bit patterns of uniform uint32.
    """
    state = key[0] ^ index.to(torch.int32)
    _fold(state, 17).mul_(_TRIPLE[0])
    state.bitwise_xor_(key[1])
    _fold(state, 11).mul_(_TRIPLE[1])
    _fold(state, 15).mul_(_TRIPLE[2])
    return _fold(state, 14)


def bits(seed: Tensor, position: Tensor, index: Tensor, stream: Tensor | int) -> Tensor:
    """Noise bits of (seed, position, index, stream): int64 in [0, 2^32), shapes broadcast."""
    return bits_from_keys(keys(seed, position, stream), index).to(torch.int64) & 0xFFFFFFFF


def uniform_from_bits(noise: Tensor) -> Tensor:
    """float32 uniforms in the open (0, 1) of int32 noise bits: (bits + 1/2) / 2^32, never 0 and never 1.

    All 32 bits are kept, so that small values are resolved to 2^-33: a comparison `u < p` with a tiny p, and the upper
    tail of the Gumbel noise (which decides every argmax), are not quantised to float32's 2^-24 step near one.
    """
    unsigned = (noise.to(torch.int64) & 0xFFFFFFFF).to(torch.float32)
    # Bits near 2^32 round up to it in float32, which would give exactly one.
    return unsigned.add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_BELOW_ONE)


def gumbel_from_bits(noise: Tensor) -> Tensor:
    """float32 standard Gumbel noise of int32 noise bits: -log(-log(1 - u)), within [-2.9, 22.9], always finite.

    1 - u in place of u (equally distributed) puts the fine end of the uniforms where the Gumbel is large; with u the
    24 bits of a float32 below one would tie the largest values of a wide row.
    """
    return uniform_from_bits(noise).neg_().log1p_().neg_().log_().neg_()


def uniform(seed: Tensor, position: Tensor, index: Tensor, stream: Tensor | int) -> Tensor:
    """float32 uniforms in the open (0, 1), a pure function of (seed, position, index, stream); shapes broadcast."""
    return uniform_from_bits(bits_from_keys(keys(seed, position, stream), index))


def gumbel(seed: Tensor, position: Tensor, index: Tensor, stream: Tensor | int) -> Tensor:
    """float32 standard Gumbel noise, finite, a pure function of (seed, position, index, stream); shapes broadcast."""
    return gumbel_from_bits(bits_from_keys(keys(seed, position, stream), index))
