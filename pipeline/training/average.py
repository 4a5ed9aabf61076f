"""A running average of the weights (EMA), in fp32, each tensor kept by one rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FILES = "average-rank-*.safetensors"


class Average:
    """average <- decay * average + (1 - decay) * weights after every optimizer step; it starts at the first weights.

    Rank r of w keeps every w-th parameter, so memory falls with the number of ranks, and a checkpoint is read back
    whatever that number is.

    Args:
        named: the module's trainable parameters. gather: whether the fp32 weights must be asked of DeepSpeed, because
            the parameters are sharded (ZeRO-3) or are bf16 copies; collective if so.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float, rank: int, world: int, gather: bool):
        self._named = list(named)
        self.decay, self._rank, self._world, self._gather = decay, rank, world, gather
        self._own: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in; every rank calls it."""
        for i, (name, parameter) in enumerate(self._named):
            weight = whole(parameter, self._gather)
            if i % self._world != self._rank:
                continue
            if name in self._own:
                self._own[name].lerp_(weight.float(), 1 - self.decay)
            else:
                self._own[name] = weight.float().clone()

    def save(self, folder: Path) -> None:
        """Writes this rank's tensors into a checkpoint folder."""
        save_file(
            {n: t.cpu().contiguous() for n, t in self._own.items()}, folder / _FILES.replace("*", str(self._rank))
        )

    def load(self, folder: Path) -> None:
        """Takes this rank's tensors from a checkpoint of any number of ranks."""
        saved = read_average(folder)
        own = [(n, p) for i, (n, p) in enumerate(self._named) if i % self._world == self._rank]
        self._own = {n: saved[n].to(p.device) for n, p in own}


def read_average(folder: Path) -> dict[str, Tensor]:
    """The averaged weights float32 of a checkpoint folder, by parameter name."""
    out: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob(_FILES)):
        out |= load_file(file)
    return out


def whole(parameter: nn.Parameter, gather: bool) -> Tensor:
    """A parameter's fp32 weight; collective if it must be gathered (as `Average` says)."""
    if not gather:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    weight: Tensor = safe_get_full_fp32_param(parameter)
    return weight
