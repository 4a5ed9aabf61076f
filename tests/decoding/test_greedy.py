"""Greedy text equals transformers' own generate, whatever drafts, batches, chunks or schedules."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pipeline.decoding import Request, make_proposer
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target
from tests.decoding.samples import KINDS, LONG, engine_for, prompt_ids, proposer_for


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("none", "global"),
        *itertools.product(("ngram", *KINDS), ("global", "fixed")),
        *itertools.product(("dspark",), ("early_stop", "asynchronous", "threshold")),
    ],
)
def test_greedy_text_is_the_targets(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
    name: str,
    scheduler: str,
) -> None:
    proposer = proposer_for(tiny, name)
    engine = engine_for(tiny, draft, "none", max_requests=5)
    engine.set_proposer(proposer)
    engine.set_schedule(scheduler)
    done = engine.generate([Request(i, max_new_tokens=LONG) for i in prompt_ids(tiny)])
    assert [d.token_ids for d in done] == expected
    assert all(d.metrics.decoded == len(d.token_ids) - 1 for d in done)
    if name == "none":
        assert all(d.metrics.tau == 1.0 for d in done)


def test_a_perfect_draft_is_accepted_whole(tiny: Target, draft: DSparkDraft, expected: list[list[int]]) -> None:
    """A proposer that knows the text gets tau = K + 1: nothing right is rejected."""
    engine = engine_for(tiny, draft, "ngram")
    ids = prompt_ids(tiny)[0]
    proposer = make_proposer("ngram", block_size=4)

    def propose(sequences: list[Any]) -> Any:
        from pipeline.decoding.proposers import Proposal

        at = len(sequences[0].tokens) - len(ids)
        block = torch.tensor([(expected[0][at : at + 4] + [0] * 4)[:4]])
        return Proposal(block, torch.tensor([4]), torch.ones(1, 4))

    proposer.propose = propose  # type: ignore[method-assign]
    engine.set_proposer(proposer)
    engine.set_schedule("fixed")
    (done,) = engine.generate([Request(ids, max_new_tokens=101)])
    assert done.token_ids == expected[0][:101]
    assert done.metrics.tau == 5.0 and done.metrics.target_steps == 20


def test_draft_context_is_the_training_forwards(tiny: Target, draft: DSparkDraft) -> None:
    """The draft sees in decoding what it sees in training: its first block's tokens are the training forward's."""
    from pipeline.target import TapCapture
    from pipeline.training.attention import block_attention

    ids = prompt_ids(tiny)[2]
    with torch.inference_mode():
        with TapCapture(tiny.family, draft.config.target_layer_ids) as capture:
            logits = tiny.model(torch.tensor([ids])).logits[0, -1]
        anchor, token = len(ids), int(logits.argmax())
        kv = draft.context_kv(draft.context(capture.taps()[0]), torch.arange(len(ids)))
        hidden = draft.blocks(
            torch.tensor([token]),
            torch.tensor([anchor]),
            lambda i, q, k, v: block_attention(q, k, v, kv[i], [anchor], [1], [torch.zeros(4, anchor)], 4),
        )
        wanted, previous = [], torch.tensor([token])
        for k in range(4):
            previous = draft.d2t[
                (draft.logits(hidden[k : k + 1]) + draft.markov_step(hidden[k : k + 1], previous)[0]).argmax(-1)
            ]
            wanted.append(int(previous))
    engine = engine_for(tiny, draft, "dspark")
    engine.set_schedule("fixed")
    seen: list[list[int]] = []
    inner = engine.proposer.propose

    def watch(sequences: list[Any]) -> Any:
        proposal = inner(sequences)
        seen.append(proposal.tokens[0].tolist())
        return proposal

    engine.proposer.propose = watch  # type: ignore[method-assign]
    engine.generate([Request(ids, max_new_tokens=8)])
    assert seen[0] == wanted


def test_a_stop_token_ends_the_text_inside_a_block(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
) -> None:
    stop = expected[3][20]
    cut = expected[3].index(stop) + 1
    engine = engine_for(tiny, draft, "ngram")
    (done,) = engine.generate([Request(prompt_ids(tiny)[3], max_new_tokens=LONG, stop_ids=(stop,))])
    assert done.token_ids == expected[3][:cut] and done.finish_reason == "stop"


def test_a_temperature_too_small_for_float32_is_greedy(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
) -> None:
    engine = engine_for(tiny, draft, "dspark")
    (done,) = engine.generate([Request(prompt_ids(tiny)[0], max_new_tokens=30, temperature=1e-38)])
    assert done.token_ids == expected[0][:30]
