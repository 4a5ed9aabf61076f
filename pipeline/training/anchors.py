"""Which blocks a sequence contributes to a step.

Letters: S sequence length, A anchors, K block size.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sampled blocks of one sequence.

    Attributes:
        anchors: int64[A], positions. supervised: bool[A, K]: slot k's label (token anchor + k + 1) counts; a prefix
            of each row, ended by the first label outside the mask or the sequence.
    """

    anchors: torch.Tensor
    supervised: torch.Tensor

    def to(self, device: torch.device) -> Blocks:
        """The same blocks there."""
        return Blocks(self.anchors.to(device), self.supervised.to(device))


def candidates(loss_mask: torch.Tensor) -> torch.Tensor:
    """int64 positions whose own and next token are in the loss mask bool[S]."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero().squeeze(-1)


def sample_blocks(loss_mask: torch.Tensor, block: int, most: int, seed: int) -> Blocks | None:
    """Draws up to `most` anchors uniformly without replacement, ascending; None if there is none.

    The draw depends on `seed` alone, so a resumed run samples what the interrupted one would have.
    """
    where = candidates(loss_mask)
    if not len(where):
        return None
    if len(where) > most:
        generator = torch.Generator().manual_seed(seed)
        where = where[torch.randperm(len(where), generator=generator)[:most]].sort().values
    labels = where[:, None] + torch.arange(1, block + 1)
    padded = torch.cat((loss_mask, torch.zeros(block + 1, dtype=torch.bool)))
    return Blocks(where, padded[labels].cumprod(1).bool())
