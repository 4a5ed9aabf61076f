"""The reference of the sequential head is its definition, and what it is given is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftline_kernels import Sampling, draw, markov_block, transform

B, K, R, V = 3, 4, 5, 30
D2T = torch.tensor([2, 3, 5, 8, 13, 21, 29])


def case(temperature: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "base": torch.randn(B, K, len(D2T), generator=g),
        "code": torch.randn(V, R, generator=g),
        "w2": torch.randn(len(D2T), R, generator=g),
        "anchor_tokens": torch.randint(0, V, (B,), generator=g),
        "anchors": torch.tensor([4, 9, 100]),
        "sampling": Sampling.of([(temperature, 0, 0.9, b) for b in range(B)]),
        "vocabulary": V,
        "d2t": D2T,
    }


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_slot_is_drawn_from_its_own_bigram_bias(rule: str, temperature: float) -> None:
    """Slot by slot, one request at a time, from the formula."""
    inputs = case(temperature)
    table, s = inputs.pop("code"), inputs["sampling"]
    got = markov_block(code=lambda k, previous: table[previous], rule=rule, logits=True, **inputs)
    for b in range(B):
        own = s.select(torch.tensor([b]))
        previous = inputs["anchor_tokens"][b]
        for k in range(K):
            assert int(got.seen[b, k]) == int(previous)
            z = (inputs["base"][b, k] + inputs["w2"] @ table[previous])[None]
            if temperature == 0:
                previous = D2T[int(z.argmax())]
            else:
                z = transform(z, own.temperature, own.top_k, own.top_p)
                torch.testing.assert_close(got.logits[b, k][None], z)
                at, ratio = inputs["anchors"][b : b + 1], rule == "ratio"
                stream, anchor = ("draft", at) if ratio else ("target", None)
                previous = draw(z, own.seed, at + 1 + k, D2T, stream=stream, anchor=anchor)[0]
            assert int(got.tokens[b, k]) == int(previous)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": None}, "give both or neither"),
        ({"base": torch.zeros(B, len(D2T))}, "base is torch.float32"),
        ({"w2": torch.zeros(9, R)}, r"w2 is \[9, 5\]"),
        ({"anchors": torch.zeros(B + 1, dtype=torch.int64)}, "anchors is torch.int64"),
        ({"d2t": None}, "the target's vocabulary is 30: give d2t"),
        ({"rule": "exact"}, "rule 'exact'"),
        ({"sampling": Sampling.of([(1.0, 0, 1.0, 0)])}, "sampling is for 1 requests"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    inputs = {**case(1.0), "code": lambda k, previous: torch.zeros(B, R)}
    with pytest.raises(ValueError, match=message):
        markov_block(**{**inputs, **change})
