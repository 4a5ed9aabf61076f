"""FlexAttention over packed sequences against the formulation that takes one sequence at a time."""

from __future__ import annotations

import platform
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from pipeline.training.attention import (
    flex_block_attention,
    flex_mask,
    flex_prefix_mask,
    flex_step_attention,
    unrolled_attention,
)
from tests.training.reference import training_attention

BLOCK, LENGTHS = 3, [6, 40, 25]
ANCHORS = [torch.tensor([0, 4]), torch.tensor([2, 3, 31, 39]), torch.tensor([20])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 7])
def test_outputs_and_gradients_are_those_of_one_sequence_at_a_time(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads, sequences of other lengths, an anchor without context; uncompiled, in float64."""
    # torch has the arithmetic of the gradient on any device, but turns CPU tensors that ask for one away.
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    g = torch.Generator().manual_seed(7)
    slots = BLOCK * sum(len(a) for a in ANCHORS)
    sizes = [(slots, 6, 4), (slots, 2, 4), (slots, 2, 4), (sum(LENGTHS), 2, 4), (sum(LENGTHS), 2, 4)]
    drawn = [torch.empty(s, dtype=torch.float64).normal_(0, 1, generator=g) for s in sizes]
    weight = torch.empty(slots, 6, 4, dtype=torch.float64).normal_(0, 1, generator=g)

    def both(kind: str) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in drawn]
        q, k, v, *context = leaves
        pair = (context[0], context[1])
        if kind == "flex":
            out = flex_block_attention(q, k, v, pair, flex_mask(LENGTHS, ANCHORS, BLOCK, window))
        else:
            out = training_attention(q, k, v, pair, LENGTHS, ANCHORS, BLOCK, window)
        (out * weight).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    for got, wanted in zip(both("flex"), both("by sequence"), strict=True):
        # The other side's softmax is in float32 whatever its inputs are.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_step_of_unrolled_blocks_is_one_softmax_over_context_and_earlier_steps(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    g = torch.Generator().manual_seed(8)
    anchors = [a.clamp(min=1) for a in ANCHORS]  # their pairs start with the one before the anchor
    blocks, context = sum(len(a) for a in anchors), sum(LENGTHS)
    sizes = [(blocks, 6, 4), (context, 2, 4), (context, 2, 4), *[(blocks, 2, 4)] * (2 * steps)]
    drawn = [torch.empty(s, dtype=torch.float64).normal_(0, 1, generator=g) for s in sizes]
    weight = torch.empty(blocks, 6, 4, dtype=torch.float64).normal_(0, 1, generator=g)

    def both(kind: str) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in drawn]
        q, keys, values, *more = leaves
        own = list(zip(more[::2], more[1::2], strict=True))
        if kind == "flex":
            out = flex_step_attention(q, (keys, values), own, flex_prefix_mask(LENGTHS, anchors))
        else:
            out = unrolled_attention(LENGTHS, anchors)(q, (keys, values), own)
        (out * weight).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    for got, wanted in zip(both("flex"), both("by sequence"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [4, 16, 128])
def test_the_table_of_a_step_is_its_masks(tile: int) -> None:
    mask = flex_prefix_mask(LENGTHS, ANCHORS, tile)
    whole = flex.create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=tile)
    assert torch.equal(mask.to_dense(), whole.to_dense())


@pytest.mark.parametrize("kind", ["blocks", "unrolled"])
def test_the_kernels_are_given_one_dtype(kind: str) -> None:
    """Autocast may leave queries and keys behind a norm in float32, and values in bfloat16."""
    given: list[torch.Tensor] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        given.extend((q, k, v))
        aux = SimpleNamespace(lse=torch.zeros(q.shape[:3]))
        return (torch.zeros_like(q), aux) if "return_aux" in options else torch.zeros_like(q)

    slots, context = BLOCK * sum(len(a) for a in ANCHORS), sum(LENGTHS)
    if kind == "unrolled":
        slots //= BLOCK
    q, k, far = torch.ones(slots, 4, 8), torch.ones(slots, 2, 8), torch.ones(context, 2, 8)
    if kind == "blocks":
        mask = flex_mask(LENGTHS, ANCHORS, BLOCK, 0)
        out = flex_block_attention(q, k, k.bfloat16(), (far, far.bfloat16()), mask, kernel)
    else:
        mask = flex_prefix_mask(LENGTHS, ANCHORS)
        out = flex_step_attention(q, (far, far.bfloat16()), [(k, k.bfloat16())], mask, kernel)
    assert {t.dtype for t in (*given, out)} == {torch.bfloat16}


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("tile", [4, 16, 128])
def test_the_table_of_tiles_is_the_masks(window: int, tile: int) -> None:
    """The compiled kernel skips what the table leaves out; uncompiled, only the mask is looked at."""
    mask = flex_mask(LENGTHS, ANCHORS, BLOCK, window, tile)
    whole = flex.create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=tile)
    assert torch.equal(mask.to_dense(), whole.to_dense())
    assert tile > 16 or not mask.to_dense().all(), "some tiles are skipped"


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
def test_the_compiled_forward_skips_no_tile_that_counts() -> None:
    g = torch.Generator().manual_seed(7)
    lengths, counts, window = [300, 90], [20, 50], 64
    anchors = [torch.randperm(n, generator=g)[:a].sort().values for n, a in zip(lengths, counts, strict=True)]
    slots = BLOCK * sum(counts)
    q, k, v = (torch.randn(slots, heads, 16, generator=g) for heads in (4, 2, 2))
    context = torch.randn(sum(lengths), 2, 16, generator=g), torch.randn(sum(lengths), 2, 16, generator=g)
    mask = flex_mask(lengths, anchors, BLOCK, window)
    # Sizes as constants: torch 2.13's code for CPU stumbles over the names of symbolic ones.
    attend = torch.compile(flex.flex_attention, dynamic=False)
    with torch.no_grad():
        out = flex_block_attention(q, k, v, context, mask, attend)
    torch.testing.assert_close(out, training_attention(q, k, v, context, lengths, anchors, BLOCK, window))
