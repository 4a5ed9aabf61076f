"""A device that is not there: tensors that say they are on it hold CPU data, and refuse to meet CPU tensors.

    with chip():
        module.to(CHIP)
        ...

What runs on CHIP computes real numbers. An operation between a tensor of CHIP and one of the CPU raises, as on a GPU
(a tensor without dimensions may take part, as there).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CHIP = torch.device("meta")  # a device every build of torch knows, and which nothing else here uses


class _OnChip(torch.Tensor):
    data_there: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> _OnChip:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=CHIP
        )
        made.data_there = data
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"OnChip({self.data_there!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor([...], device=CHIP): its numbers never pass through an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == CHIP.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(CHIP)
        return func(*args, **kwargs)


@contextlib.contextmanager
def chip() -> Iterator[None]:
    """While it lasts, CHIP is there."""
    with _Operations(), _Literals():
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, _OnChip)]
    device = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not moves:
        strangers = [t for t in tensors if not isinstance(t, _OnChip) and t.dim()]
        shapes = [list(t.shape) for t in strangers]
        assert not strangers, f"{func}: tensors of CHIP beside CPU tensors of shapes {shapes}"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map(lambda t: t.data_there if isinstance(t, _OnChip) else t, (args, kwargs))
    out = func(*inner[0], **inner[1])
    to_chip = bool(there) if device is None else torch.device(device).type == CHIP.type
    if not to_chip:
        return out
    if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) and out is inner[0][0]:
        return args[0]
    return tree_map(lambda t: _OnChip(t) if isinstance(t, torch.Tensor) else t, out)


def fetched(t: torch.Tensor) -> torch.Tensor:
    """The CPU tensor of one on CHIP."""
    assert isinstance(t, _OnChip), "not on CHIP"
    return t.data_there
