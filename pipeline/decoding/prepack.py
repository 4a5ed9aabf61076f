"""Linear layers on prepacked oneDNN weights, for CPU decoding.

A GEMM over a few tokens spends its time laying out the weight anew at each call; packed once, verifying 4-8 tokens
costs little more than one (`benchmarks/engine.py --parts steps` measures it).
"""

from __future__ import annotations

import torch
from torch import nn


def available() -> bool:
    """Whether this torch build has oneDNN's packed linear for fp32."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Module):
    """y = x W^T + b on a prepacked copy of W [out, in]; the weight itself is not kept.

    Args:
        tokens: number of rows the packing is made for; other numbers work as well, a little slower.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, tokens: int = 8) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), tokens)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(module: nn.Module, tokens: int = 8) -> int:
    """Replaces every fp32 CPU `nn.Linear` below `module` by a PackedLinear; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
            setattr(module, name, PackedLinear(child.weight, child.bias, tokens))
            count += 1
        else:
            count += prepack(child, tokens)
    return count
