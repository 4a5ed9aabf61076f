"""draftline's kernels and their torch references: noise, sampling, verification. Depends on torch (and triton) only."""

from __future__ import annotations

from .noise import gumbel, uniform
from .sampling import BLOCK, STREAMS, Sampling, draw, proposal_stream, transform
from .verify import VerifyResult, verify

__all__ = [
    "BLOCK",
    "STREAMS",
    "Sampling",
    "VerifyResult",
    "draw",
    "gumbel",
    "proposal_stream",
    "transform",
    "uniform",
    "verify",
]
