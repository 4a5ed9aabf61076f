"""Eagle3's warm start from features: what it predicts from taps, and then from its own output, in a linear world."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.drafts.recurrence import PairSamples, layer_from_pairs
from pipeline.errors import ConfigError
from pipeline.target import Target
from pipeline.training.unroll import unrolled_hidden
from tests.drafts.samples import small_draft

SETTINGS = {
    "algorithm": "eagle3",
    "block_size": 2,
    "num_layers": 1,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "qk_norm": False,
    "vocabulary": 0,
    "markov_head_type": "none",
    "enable_confidence_head": False,
}
LENGTH = 3000


def world(draft: Eagle3Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [S], taps [S, L*D], hidden [S, D]) of one long text whose every hidden state follows from the one before
    and the token, in few directions, and whose taps show it under noise."""
    g = torch.Generator().manual_seed(3)
    size, width = draft.config.hidden_size, draft.config.hidden_size * len(draft.config.target_layer_ids)
    draft.embed = draft.embed + 2.0 * draft.embed.std() * torch.randn(size, generator=g)
    tokens = torch.randint(0, target.vocab_size, (LENGTH,), generator=g)
    seen = F.rms_norm(draft.embed[tokens].float(), (size,))
    turn = torch.randn(size, 6, generator=g) @ torch.randn(6, size, generator=g) / size**0.5 / 6**0.5
    told = torch.randn(size, 6, generator=g) @ torch.randn(6, size, generator=g) / size**0.5 / 6**0.5
    steady = torch.randn(size, generator=g)
    states = [torch.randn(size, generator=g)]
    for e in seen[1:]:
        states.append(F.rms_norm(states[-1] @ turn + 2.0 * e @ told + steady, (size,)))
    state = torch.stack(states)
    taps = state @ torch.randn(size, width, generator=g) / size**0.5 + 2.0 * torch.randn(width, generator=g)
    taps = taps + 0.05 * torch.randn(LENGTH, width, generator=g)
    return tokens, taps, state * target.family.final_norm_gain.float()


def samples(tokens: torch.Tensor, taps: torch.Tensor, hidden: torch.Tensor, n: int = LENGTH) -> PairSamples:
    a = torch.arange(2, n)
    return PairSamples(taps[a - 1], tokens[a], hidden[a], taps[a - 2], tokens[a - 1])


@pytest.mark.parametrize("before", [True, False])
def test_both_steps_start_with_the_targets_hidden_states(tiny: Target, before: bool) -> None:
    """In blocks deep in the text, with attention over all of it: the first step reads taps, the second the first's
    output."""
    draft = small_draft(tiny, **{**SETTINGS, "norm_before_residual": before})
    assert isinstance(draft, Eagle3Draft)
    tokens, taps, hidden = world(draft, tiny)
    anchors = torch.arange(20, 180, 4)
    wanted = torch.stack((hidden[anchors], hidden[anchors + 1]), 1)

    def alike() -> list[float]:
        with torch.no_grad():
            out = unrolled_hidden(draft, [tokens[:200]], [taps[:200]], [anchors]).unflatten(0, (-1, 2))
        # The part that does not vary tells nothing.
        told, true = out - out.mean(0), wanted - wanted.mean(0)
        return F.cosine_similarity(told, true, dim=-1).mean(0).tolist()

    assert max(map(abs, alike())) < 0.3
    layer_from_pairs(draft, tiny.family.final_norm_gain.float(), samples(tokens, taps, hidden))
    first, second = alike()
    assert first > 0.85
    assert second > 0.7


def test_too_few_samples_are_refused_with_what_to_do(tiny: Target) -> None:
    draft = small_draft(tiny, **SETTINGS)
    assert isinstance(draft, Eagle3Draft)
    with pytest.raises(ConfigError, match=r"from 10 samples.*warm_start\.layers=target"):
        layer_from_pairs(draft, tiny.family.final_norm_gain.float(), samples(*world(draft, tiny), n=12))
