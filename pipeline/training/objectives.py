"""What a step is scored with: the vocabulary loss (its definition is `draftline_kernels.vocab_loss`) and the weights of
positions. Letters: K slots of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftline_kernels import RowStats, vocab_loss

__all__ = ["RowStats", "SurvivalWeights", "position_weights", "vocab_loss"]


def position_weights(block: int, decay: float) -> Tensor:
    """float32[K]: exp(-(k - 1) / decay), k from 1 (eq. 9)."""
    return torch.exp(-torch.arange(block) / decay)


class SurvivalWeights:
    """Position weights that follow how far blocks survive in training, after D-PACE (arXiv 2605.18810, eqs. 7, 8).

    S_k is the mean, over recent blocks of all ranks that are supervised throughout, of the probability that their first
    k tokens are all accepted; c_k = S_k / S_(k-1), smoothed to floor + (1 - floor) c_k. A position weighs as much as
    log c_k moves the expected length: w_k = sum over m >= k of prod over i <= m of the smoothed c_i, scaled to w_1 = 1.

    D-PACE takes each block's own confidence in the true tokens. A mean over blocks is known before a step's first
    forward, so it can be in the step's denominators and is the same on every rank.

    Args:
        block: K. floor: above 0, at most 1. memory: what a step leaves of what was seen before it, from 0 to below 1.
    """

    def __init__(self, block: int, floor: float, memory: float) -> None:
        self._floor, self._memory = floor, memory
        self._seen = torch.zeros(block + 1, dtype=torch.float64)  # sums of S_1..S_K, and how many blocks

    def observe(self, survival: Tensor, blocks: Tensor) -> None:
        """Takes in a step, summed over all ranks: float64[K] survival and float64[] blocks (as in StepMetrics)."""
        self._seen = self._seen * self._memory + torch.cat((survival, blocks.reshape(1))).to(self._seen)

    def weights(self) -> Tensor:
        """float32[K]; before anything was observed, as if nothing had survived."""
        survival = torch.cat((self._seen[-1:], self._seen[:-1]))
        smoothed = self._floor + (1 - self._floor) * (survival[1:] / survival[:-1].clamp(min=1e-12)).clamp(max=1)
        reach = smoothed.cumprod(0).flip(0).cumsum(0).flip(0)
        return (reach / reach[0]).float()

    def state(self) -> list[float]:
        """What `load` makes the same object of, exactly."""
        return self._seen.tolist()

    def load(self, state: Sequence[float]) -> None:
        """Goes on from a `state`.

        Raises:
            ValueError: it is of another block size.
        """
        if len(state) != len(self._seen):
            raise ValueError(
                f"a state of {len(state)} numbers; blocks of {len(self._seen) - 1} have one more than that"
            )
        self._seen = torch.tensor(state, dtype=torch.float64)
