"""What training measured is what serving does: the training forward and the decoding proposer give the same logits.

The proposer sees prompts in chunks, keeps keys in pages and drafts several requests at once; training sees whole
sequences with many anchors. Wrong context bounds, positions, slot layouts or a stale cache show up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers import Proposer, make_proposer
from pipeline.decoding.proposers.base import Commit
from pipeline.decoding.proposers.dspark import DSparkProposer
from pipeline.decoding.request import Request, Sequence
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.target import Target
from pipeline.training.unroll import unrolled_hidden
from tests.drafts.samples import small_draft
from tests.training.reference import training_hidden
from tests.training.test_step import KINDS


def training_logits(
    draft: DSparkDraft, tokens: torch.Tensor, taps: torch.Tensor, anchor: int, proposed: torch.Tensor
) -> torch.Tensor:
    """[G, Vd] of the block at `anchor` by the training forward, with the proposed tokens as the Markov head's past."""
    if isinstance(draft, Eagle3Draft):  # it takes the tokens of the text, so the text goes on as the draft proposed
        text = torch.cat((tokens[: anchor + 1], proposed))
        rows = torch.cat((taps[:anchor], torch.full((1 + len(proposed), taps.shape[1]), 99.0)))
        return draft.logits(unrolled_hidden(draft, [text], [rows], [torch.tensor([anchor])]))
    hidden = training_hidden(draft, [tokens], [taps], [torch.tensor([anchor])])
    previous = torch.cat((tokens[anchor][None], proposed[:-1]))
    bias: torch.Tensor | float = 0.0
    if draft.markov_head is not None:
        bias = draft.markov_head.markov_w2(draft.markov_head.codes(hidden[None], previous[None])[0])
    return draft.logits(hidden) + bias


def all_held() -> PagePool:
    """A pool whose pages are all somebody's, as the requests below take theirs where they like."""
    pool = PagePool(128, 4)
    pool.take(128)
    return pool


def begin(proposer: Proposer, text: list[int], number: int = 0, **options: Any) -> Sequence:
    """A request with pages of its own that lie apart from each other and in no order."""
    pages = [16 * j + (7 * number + 3 * j) % 16 for j in (5, 1, 3, 0, 7, 2, 6, 4)]
    sequence = Sequence(Request(list(text), **options), frozenset(), list(text), pages)
    proposer.admit(sequence)
    return sequence


def commit(proposer: Proposer, sequence: Sequence, start: int, taps: torch.Tensor) -> None:
    proposer.commit([Commit(sequence, start, slice(0, len(taps)))], taps)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", [{"qk_norm": False}, *KINDS.values()], ids=["no qk norm", *KINDS])
def test_a_decoded_block_has_the_training_forwards_logits(tiny: Target, pack: bool, kind: dict[str, Any]) -> None:
    draft = small_draft(tiny, **kind)
    generator = torch.Generator().manual_seed(3)
    lengths = [14, 5, 9]
    proposer = make_proposer(draft.config.algorithm, draft, rule="ratio", pack=pack)
    proposer.attach(all_held())
    texts, sequences = [], []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, tiny.vocab_size, (length,), generator=generator)
        taps = torch.randn(length, 2 * tiny.hidden_size, generator=generator)
        sequence = begin(proposer, tokens.tolist(), number, temperature=1.0, seed=number)
        half = length // 2
        commit(proposer, sequence, 0, taps[:half])
        commit(proposer, sequence, half, taps[half : length - 1])
        texts.append((tokens, taps))
        sequences.append(sequence)

    proposal = proposer.propose(sequences)

    for row, (tokens, taps) in enumerate(texts):
        expected = training_logits(draft, tokens, taps, len(tokens) - 1, proposal.tokens[row])
        torch.testing.assert_close(proposal.logits[row], expected, rtol=1e-4, atol=1e-4)
        assert set(proposal.tokens[row].tolist()) <= set(draft.d2t.tolist())


@pytest.mark.parametrize("kind", ["own matrices", "eagle3, own matrices"])
def test_decoding_in_16_bits_leaves_the_draft_s_own_matrices_as_they_are(tiny: Target, kind: str) -> None:
    """The proposer works on a copy in the target's dtype."""
    tiny.model.bfloat16()
    draft = small_draft(tiny, **KINDS[kind])
    assert draft.dtype == torch.bfloat16 and draft.lm_rows.dtype == torch.float32
    proposer = make_proposer(draft.config.algorithm, draft)
    assert {p.dtype for p in proposer.draft.parameters()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in draft.parameters())


def test_a_block_left_behind_in_the_cache_does_not_change_the_next_one(tiny: Target) -> None:
    draft = small_draft(tiny)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, tiny.vocab_size, (12,), generator=generator)
    taps = torch.randn(12, 2 * tiny.hidden_size, generator=generator)
    proposer = DSparkProposer(draft, rule="ratio")
    proposer.attach(all_held())
    sequence = begin(proposer, tokens[:7].tolist(), temperature=1.0)
    commit(proposer, sequence, 0, taps[:6])
    proposer.propose([sequence])

    sequence.tokens = tokens[:9].tolist()
    commit(proposer, sequence, 6, taps[6:8])
    proposal = proposer.propose([sequence])

    expected = training_logits(draft, tokens, taps, 8, proposal.tokens[0])
    torch.testing.assert_close(proposal.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_confidence_is_the_training_heads(tiny: Target) -> None:
    draft = small_draft(tiny)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, tiny.vocab_size, (8,), generator=generator)
    taps = torch.randn(8, 2 * tiny.hidden_size, generator=generator)
    draft.temperatures.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    proposer = DSparkProposer(draft)
    proposer.attach(all_held())
    sequence = begin(proposer, tokens.tolist())
    commit(proposer, sequence, 0, taps[:7])

    proposal = proposer.propose([sequence])

    hidden = training_hidden(draft, [tokens], [taps], [torch.tensor([7])])
    raw = draft.confidence(hidden, torch.cat((tokens[7:8], proposal.tokens[0, :-1])))
    torch.testing.assert_close(proposal.raw_confidence[0], raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(proposal.confidence[0], torch.sigmoid(raw / draft.temperatures), rtol=1e-4, atol=1e-5)
