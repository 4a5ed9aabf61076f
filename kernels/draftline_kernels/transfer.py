"""What the host builds for a step, on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes: Triton compiles a kernel anew where a pointer is a multiple of them in one call and not in another."""


def at_once(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """CPU tensors on `device`, in one copy that nobody waits for."""
    device = torch.device(device)
    sizes = [t.numel() * t.element_size() for t in tensors]
    spans = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    packed = torch.zeros(sum(spans), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor, size in zip(packed.split(spans), tensors, sizes, strict=True):
        part[:size] = tensor.contiguous().flatten().view(torch.uint8)
    there = packed.to(device, non_blocking=True).split(spans)
    return [
        part[:size].view(tensor.dtype).view(tensor.shape)
        for part, tensor, size in zip(there, tensors, sizes, strict=True)
    ]
