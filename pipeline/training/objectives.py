"""What a step is scored with: the vocabulary loss (its definition is `draftline_kernels.vocab_loss`) and the weights of
positions. Letters: K slots of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from draftline_kernels import RowStats, vocab_loss

__all__ = ["RowStats", "position_weights", "vocab_loss"]


def position_weights(block: int, decay: float) -> Tensor:
    """float32[K]: exp(-(k - 1) / decay), k from 1 (eq. 9)."""
    return torch.exp(-torch.arange(block) / decay)
