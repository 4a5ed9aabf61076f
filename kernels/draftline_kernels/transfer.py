"""What the host builds for a step, on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes: Triton compiles a kernel anew where a pointer is a multiple of them in one call and not in another."""


def at_once(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """CPU tensors on `device`, contiguous, in one copy that nobody waits for; themselves where that is the CPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return [t.contiguous() for t in tensors]
    packed = torch.zeros(sum(map(_span, tensors)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    pack(tensors, packed)
    return views(tensors, packed.to(device, non_blocking=True))


def pack(tensors: Sequence[Tensor], packed: Tensor) -> None:
    """Writes CPU tensors one behind the other into uint8 bytes, each at a multiple of 16."""
    for view, tensor in zip(views(tensors, packed), tensors, strict=True):
        view.copy_(tensor)


def views(tensors: Sequence[Tensor], packed: Tensor) -> list[Tensor]:
    """What lies where `pack` put each of these tensors."""
    parts = packed.split([_span(t) for t in tensors])
    return [
        part[: t.numel() * t.element_size()].view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)
    ]


def _span(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
