"""draftline's kernels and their torch references: noise, sampling, verification, the sequential head, attention over
pages, the vocabulary loss. Depends on torch (and, on CUDA, triton) only."""

from __future__ import annotations

from .markov_block import Block, Code, markov_block
from .noise import gumbel, uniform
from .overrides import Adjustment, Overrides, Said, Touched, touched
from .ragged_paged_attention import ragged_paged_attention
from .sampling import BLOCK, COLDEST, STREAMS, Sampling, draw, proposal_stream
from .transfer import at_once
from .truncation import transform
from .verify import VerifyResult, verify
from .vocab_loss import RowStats, vocab_loss

__all__ = [
    "BLOCK",
    "COLDEST",
    "STREAMS",
    "Adjustment",
    "Block",
    "Code",
    "Overrides",
    "RowStats",
    "Said",
    "Sampling",
    "Touched",
    "VerifyResult",
    "at_once",
    "draw",
    "gumbel",
    "markov_block",
    "proposal_stream",
    "ragged_paged_attention",
    "touched",
    "transform",
    "uniform",
    "verify",
    "vocab_loss",
]
