"""The sequential head's kernel draws the reference's block, token for token, with the logits it was drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftline_kernels import BLOCK, Block, Sampling, markov_block, markov_block_triton, proposal_stream
from tests.kernels.device.test_verify import ASKS, moved, sampling_of

K, RANK = 3, 24


def case(asks: str, *, whole: bool = False, head: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch over a whole vocabulary of two noise blocks, or over a draft vocabulary spread over three."""
    g = torch.Generator().manual_seed(3)
    vocabulary = BLOCK + 130 if whole else 2 * BLOCK + 500
    d2t = None if whole else torch.randperm(vocabulary, generator=g)[:333].sort().values
    width = vocabulary if d2t is None else len(d2t)
    batch = len(ASKS[asks]) + 2
    w1 = torch.randn(vocabulary, RANK, generator=g)
    return {
        "base": (torch.randn(batch, K, width, generator=g) * 3).to(dtype),
        "w1": w1 if head else None,
        "w2": (torch.randn(width, RANK, generator=g) * 0.4).to(dtype) if head else None,
        "anchor_tokens": torch.randint(0, vocabulary, (batch,), generator=g),
        "anchors": torch.randint(0, 4000, (batch,), generator=g),
        "sampling": sampling_of(ASKS[asks], [7 * b + 1 for b in range(batch)]),
        "vocabulary": vocabulary,
        "d2t": d2t,
    }


def both(device: torch.device, inputs: dict[str, Any], rule: str, logits: bool) -> tuple[Block, Block]:
    """The reference's block and the kernel's."""
    w1, s = inputs["w1"], inputs["sampling"]
    rest = {n: v for n, v in inputs.items() if n != "w1"}

    def code(k: int, previous: torch.Tensor) -> torch.Tensor:
        return w1.to(previous.device)[previous] * (1 + k)

    wanted = markov_block(code=None if w1 is None else code, rule=rule, logits=logits, **rest)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in rest.items()}
    there["sampling"] = moved(s, device)
    own = there["anchors"] if rule == "ratio" else None
    got = markov_block_triton.markov_block(
        code=None if w1 is None else code, stream=proposal_stream(rule), own_anchor=own, logits=logits, **there
    )
    return wanted, got


def agree(wanted: Block, got: Block, sampling: Sampling) -> None:
    assert got.tokens.tolist() == wanted.tokens.tolist()
    assert got.seen.tolist() == wanted.seen.tolist()
    assert (got.logits is None) == (wanted.logits is None)
    if wanted.logits is not None and got.logits is not None:
        drawn = sampling.temperature > 0
        torch.testing.assert_close(got.logits.cpu()[drawn], wanted.logits[drawn], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asks", ASKS)
def test_a_coupled_block(device: torch.device, asks: str) -> None:
    inputs = case(asks)
    wanted, got = both(device, inputs, "coupled", logits=False)
    agree(wanted, got, inputs["sampling"])
    assert torch.equal(wanted.seen[:, 1:], wanted.tokens[:, :-1])


@pytest.mark.parametrize("asks", ["plain", "mixed"])
def test_a_ratio_block_keeps_what_it_was_drawn_from(device: torch.device, asks: str) -> None:
    inputs = case(asks)
    agree(*both(device, inputs, "ratio", logits=True), inputs["sampling"])


def test_the_whole_vocabulary(device: torch.device) -> None:
    inputs = case("mixed", whole=True)
    inputs["base"] = inputs["base"][:, :2]
    agree(*both(device, inputs, "coupled", logits=False), inputs["sampling"])


def test_without_a_head(device: torch.device) -> None:
    inputs = case("mixed", head=False)
    agree(*both(device, inputs, "coupled", logits=True), inputs["sampling"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_summed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    """As the reference on the same values in float32, which doesn't round the bias on its way."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices by their bit patterns")
    inputs = case("plain", dtype=dtype)
    inputs["w1"] = inputs["w1"].to(dtype).float()
    _, got = both(device, inputs, "coupled", logits=False)
    table = inputs.pop("w1")
    wide = inputs | {n: inputs[n].float() for n in ("base", "w2")}
    wanted = markov_block(code=lambda k, previous: (table[previous] * (1 + k)).to(dtype).float(), **wide)
    assert got.tokens.tolist() == wanted.tokens.tolist()


def test_more_requests_than_a_group(device: torch.device) -> None:
    """70 requests: two groups of products, the second ragged."""
    inputs = case("plain")
    g = torch.Generator().manual_seed(9)
    n = 70
    inputs |= {
        "base": torch.randn(n, 1, 333, generator=g),
        "anchor_tokens": torch.randint(0, 4000, (n,), generator=g),
        "anchors": torch.arange(n),
        "sampling": Sampling.of([(1.0, 0, 1.0, b) for b in range(n)]),
    }
    agree(*both(device, inputs, "coupled", logits=False), inputs["sampling"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_as_on_the_cpu() -> None:
    """The public function, both dispatches."""
    inputs = case("mixed", whole=True)
    w1 = inputs.pop("w1")
    wanted = markov_block(code=lambda k, previous: w1[previous], **inputs)
    there = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    there["sampling"] = moved(inputs["sampling"], "cuda")
    got = markov_block(code=lambda k, previous: w1.cuda()[previous], **there)
    assert got.tokens.tolist() == wanted.tokens.tolist()
