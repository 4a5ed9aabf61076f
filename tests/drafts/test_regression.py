"""The warm start from features: what it claims about attention and prediction, on features made to be linear."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.regression import Samples, layers_from_features
from pipeline.errors import ConfigError
from pipeline.target import Target
from pipeline.training.attention import block_attention
from tests.drafts.samples import small_draft

N = 3000
SETTINGS = {"block_size": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "qk_norm": False, "vocabulary": 0}
PLAIN = {"markov_head_type": "none", "enable_confidence_head": False}


def linear_world(draft: DSparkDraft, target: Target, n: int = N) -> Samples:
    """Features and embeddings with a mean, as real ones have, and a hidden state linear in few directions of them."""
    g = torch.Generator().manual_seed(3)
    size = draft.config.hidden_size
    draft.embed = draft.embed + 2.0 * draft.embed.std() * torch.randn(size, generator=g)
    width = size * len(draft.config.target_layer_ids)
    taps = torch.randn(n, 12, generator=g) @ torch.randn(12, width, generator=g) + 6.0 * torch.randn(width, generator=g)
    tokens = torch.randint(0, target.vocab_size, (n,), generator=g)
    seen = F.rms_norm(draft.embed[tokens].float(), (size,))
    hidden = taps @ torch.randn(width, size, generator=g) / width**0.5
    hidden = hidden + 4.0 * seen @ torch.randn(size, 4, generator=g) @ torch.randn(4, size, generator=g) / size**0.5
    hidden = F.rms_norm(hidden, (size,)) * target.family.final_norm.weight.detach()
    return Samples(taps, tokens, hidden)


def _attend(draft: DSparkDraft, kv: list[tuple[Tensor, Tensor]], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block = draft.config.block_size
    return block_attention(q, k, v, kv[layer], [9], [1], [torch.zeros(block, 9)], block)


@torch.no_grad()
def first_slot(draft: DSparkDraft, samples: Samples, chosen: list[int]) -> torch.Tensor:
    """Hidden states of the first slot that predicts when each chosen sample's anchor follows a context whose last
    position is its own and whose others are other samples'."""
    out = []
    for i in chosen:
        before = [(i + 7 * j) % len(samples.tokens) for j in range(1, 9)]
        kv = draft.context_kv(draft.context(samples.taps[[*before, i]].float()), torch.arange(9))
        out.append(draft.blocks(samples.tokens[i : i + 1], torch.tensor([9]), partial(_attend, draft, kv))[0])
    return torch.stack(out)


@pytest.mark.parametrize("layout", [{}, {"algorithm": "dflash", "sample_from_anchor": False, **PLAIN}])
def test_the_first_slot_starts_with_the_targets_next_hidden_state(tiny: Target, layout: dict[str, object]) -> None:
    """Of 60 samples in contexts of other samples' features, what the first slot that predicts holds points where the
    target's state does, in DSpark's layout and in DFlash's."""
    draft = small_draft(tiny, **{**SETTINGS, **layout})
    samples = linear_world(draft, tiny)
    chosen = list(range(60))
    cold = F.cosine_similarity(first_slot(draft, samples, chosen), samples.hidden[chosen], dim=-1).mean()
    layers_from_features(draft, tiny.family, samples)
    warm = F.cosine_similarity(first_slot(draft, samples, chosen), samples.hidden[chosen], dim=-1).mean()
    assert abs(cold) < 0.3
    assert warm > 0.85


def test_further_layers_start_as_the_identity(tiny: Target) -> None:
    one, two = (small_draft(tiny, **{**SETTINGS, "num_layers": n}) for n in (1, 2))
    samples = linear_world(one, tiny)
    two.embed = one.embed
    for draft in (one, two):
        layers_from_features(draft, tiny.family, samples)
    torch.testing.assert_close(first_slot(one, samples, [0, 1]), first_slot(two, samples, [0, 1]))


@pytest.mark.parametrize(
    ("changes", "n", "words"),
    [
        ({"qk_norm": True}, N, "qk_norm"),
        ({"num_kv_heads": 1}, N, "KV heads"),
        ({"head_dim": 2}, N, "rotary frequencies"),
        ({}, 10, "10 samples"),
    ],
)
def test_what_has_no_closed_form_is_refused_with_what_to_do(
    tiny: Target, changes: dict[str, object], n: int, words: str
) -> None:
    draft = small_draft(tiny, **{**SETTINGS, **changes})
    with pytest.raises(ConfigError, match=words) as caught:
        layers_from_features(draft, tiny.family, linear_world(draft, tiny, n))
    assert "warm_start.layers=target" in str(caught.value)
