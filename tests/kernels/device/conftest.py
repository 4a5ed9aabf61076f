"""The Triton kernels of this folder run on the GPU where there is one, else in Triton's interpreter, on CPU tensors.

The interpreter must be asked for before Triton is first imported, and much of the library imports it; so without a GPU
these files are collected only where TRITON_INTERPRET=1, which `tests/kernels/test_interpreted.py` sets for a process of
their own.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy, which the interpreter computes with, warns of the infinities that the kernels mean."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
