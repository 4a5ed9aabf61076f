"""KV storage of the running requests: one slot per request, contiguous per layer.

Shapes: slots R, KV heads H, capacity C positions, head dim d. Keys and values of a layer are [R, H, C, d]. A slot
is free or owned by one sequence; rejected tokens need no cleaning, since a position is rewritten before it can be
attended to (a query sees positions below its own only).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from pipeline.errors import DraftlineError


class SlotPool:
    """Hands out slots 0..n-1, lowest free first, and refuses double use."""

    def __init__(self, slots: int) -> None:
        self.size = slots
        self._free = list(range(slots))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> frozenset[int]:
        return frozenset(self._used)

    def take(self) -> int:
        """The lowest free slot. Raises IndexError when none is free."""
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        if slot not in self._used:
            raise AssertionError(f"slot {slot} returned but not in use")
        self._used.remove(slot)
        heapq.heappush(self._free, slot)


class KVCache:
    """Keys and values of `layers` layers for `slots` requests of up to `capacity` positions."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, slots, kv_heads, capacity, head_dim)
        self.k, self.v = _zeros([shape, shape], slots, capacity, dtype, device)
        self.slots, self.capacity = slots, capacity

    def write(self, layer: int, slots: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v [T, H, d] of one layer at (slot, position) pairs: int64[T] each."""
        self.k[layer, slots, :, positions] = k
        self.v[layer, slots, :, positions] = v


class LayeredKVCache:
    """Keys and values of layers that differ in KV heads and head dims, and of which some keep none.

    Args:
        shapes: per layer (KV heads, key dim, value dim), or None for a layer that reads another's.
    Attributes:
        k, v: per layer that keeps its own: [R, H, C, key dim] and [R, H, C, value dim].
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int] | None],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        own = [(i, *shape) for i, shape in enumerate(shapes) if shape is not None]
        keys = [(slots, heads, capacity, key) for _, heads, key, _ in own]
        values = [(slots, heads, capacity, value) for _, heads, _, value in own]
        made = _zeros(keys + values, slots, capacity, dtype, device)
        self.k = {i: made[n] for n, (i, *_) in enumerate(own)}
        self.v = {i: made[n + len(own)] for n, (i, *_) in enumerate(own)}
        self.slots, self.capacity, self.dtype, self.device = slots, capacity, dtype, device

    def write(self, layer: int, slots: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v [T, H, d] of one layer at (slot, position) pairs: int64[T] each."""
        self.k[layer][slots, :, positions] = k
        self.v[layer][slots, :, positions] = v


def _zeros(
    shapes: Sequence[tuple[int, ...]], slots: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    try:
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    except RuntimeError as e:
        gib = sum(torch.Size(s).numel() for s in shapes) * dtype.itemsize / 2**30
        raise DraftlineError(
            f"The KV cache of {slots} requests x {capacity} tokens needs {gib:.1f} GiB, which is not there ({e}). "
            "Lower engine.max_requests or engine.max_context."
        ) from None
