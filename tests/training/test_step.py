"""The training step against a plain reference: one block at a time, full vocabulary, autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.target import TapCapture, Target
from pipeline.training.anchors import candidates, sample_blocks
from pipeline.training.step import TrainStep, Weights
from tests.drafts.samples import small_draft
from tests.training.reference import plain_eagle3


def _row(target: Target, length: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, target.vocab_size, (length,), generator=generator)
    with TapCapture(target.family, [0, 2]) as capture, torch.no_grad():
        hidden = target.family.backbone(ids[None]).last_hidden_state[0]
    with torch.no_grad():
        logits = target.model(ids[None]).logits[0]
    mask = torch.zeros(length, dtype=torch.bool)
    mask[5 : length - 3] = True
    mask[9] = False
    return SimpleNamespace(
        sample_id=f"{seed:032x}",
        input_ids=ids.int(),
        loss_mask=mask,
        taps=capture.taps()[0],
        last_hidden=hidden,
        logits=logits,  # the target's own, for the reference
    )


def _reference(
    draft: DSparkDraft,
    rows: list[Any],
    step: TrainStep,
    of: Weights,
    position_weights: torch.Tensor | None,
) -> torch.Tensor:
    terms, weight, inside_weight = [], 0.0, 0.0
    for r in rows:
        blocks = step.blocks_of(r, 0)
        assert blocks is not None
        context = draft.context(r.taps)
        for i, a in enumerate(blocks.anchors.tolist()):
            kv = [] if isinstance(draft, Eagle3Draft) else draft.context_kv(context[:a], torch.arange(a))

            def attend(
                layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any = kv, a: int = a
            ) -> torch.Tensor:
                k, v = torch.cat((kv[layer][0], k)), torch.cat((kv[layer][1], v))
                groups, window = q.shape[1] // k.shape[1], draft.config.window(layer)
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
                for slot in range(q.shape[2]):
                    if window:
                        seen[slot, : max(0, min(a, a + slot - window + 1))] = False
                return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)

            if isinstance(draft, Eagle3Draft):
                h = plain_eagle3(draft, r.input_ids.long(), r.taps, a)
            else:
                h = draft.blocks(r.input_ids[a : a + 1].long(), torch.tensor([a]), attend)
            state = None
            for k in range(draft.config.tokens_per_block):
                if not blocks.supervised[i, k]:
                    continue
                before, label = r.input_ids[a + k].long(), r.input_ids[a + k + 1].long()
                bias, state = draft.markov_step(h[k], before, state)
                z = draft.logits(h[k]) + bias
                p = r.logits[a + k].softmax(-1)
                l1 = (z.softmax(-1) - p[draft.d2t]).abs().sum() + 1 - p[draft.d2t].sum()
                w = math.exp(-k / 4) if position_weights is None else float(position_weights[k])
                weight += w
                column = (draft.d2t == label).nonzero()
                ce: Any = 0.0
                if len(column):
                    ce = -z.log_softmax(-1)[column[0, 0]]
                    inside_weight += w
                guess = draft.confidence(h[k], before)
                bce: Any = 0.0
                if guess is not None:
                    bce = F.binary_cross_entropy_with_logits(guess, (1 - 0.5 * l1).detach())
                log_q, inner = z.log_softmax(-1), p[draft.d2t]
                kl = (inner * (inner.log() - inner.sum().log() - log_q)).sum()
                rkl = (log_q.exp() * (log_q - inner.log())).sum()
                acceptance = 1 - 0.5 * l1
                share = torch.exp(-of.lk_eta * acceptance.detach())
                rest = of.tv * l1 + of.kl * kl + of.reverse_kl * rkl - of.lk * acceptance.log()
                rest = rest + of.lk_hybrid * (share * kl + (1 - share) * (1 - acceptance))
                terms.append((w, ce, rest + of.confidence * bce))
    return sum(of.ce * w * ce / inside_weight + rest * w / weight for w, ce, rest in terms)  # type: ignore[return-value]


EAGLE3: dict[str, Any] = {
    "algorithm": "eagle3",
    "num_layers": 1,
    "markov_head_type": "none",
    "enable_confidence_head": False,
}
OWN = {"own_embedding": True, "own_lm_head": True}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "confidence on hidden": {"confidence_head_with_markov": False},
    "windows": {"sliding_windows": [6, 0]},
    "own matrices": OWN,
    "dflash": {
        "algorithm": "dflash",
        "sample_from_anchor": False,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
    "eagle3": EAGLE3,
    "eagle3, residual after the norm": {**EAGLE3, "norm_before_residual": True},
    "eagle3, own matrices": {**EAGLE3, **OWN},
}


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_plain_formulation(tiny: Target, kind: str, chunk: int) -> None:
    check_against_plain(tiny, small_draft(tiny, vocabulary=200, **KINDS[kind]), chunk)


def test_every_term_and_learned_position_weights_equal_the_plain_formulation(tiny: Target) -> None:
    weights = Weights(ce=0.2, kl=0.3, tv=0.4, confidence=0.5, reverse_kl=0.6, lk=0.7, lk_hybrid=0.8, lk_eta=2.0)
    check_against_plain(tiny, small_draft(tiny, vocabulary=200), 16, weights, torch.tensor([1.0, 0.4, 0.7, 0.2]))


def check_against_plain(
    target: Target,
    draft: DSparkDraft,
    chunk: int = 1024,
    weights: Weights = Weights(),  # noqa: B008
    position_weights: torch.Tensor | None = None,
) -> None:
    """The step's loss and every gradient against one block at a time over the target's own logits."""
    rows = [_row(target, 30, 1), _row(target, 19, 2)]
    step = TrainStep(draft, target.family.lm_head.weight, weights, num_anchors=6, seed=0, chunk=chunk)
    if position_weights is not None:
        step.weigh_positions(position_weights)
    loss, _ = step(rows, 0)
    loss.backward()
    mine = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    reference = _reference(draft, rows, step, weights, position_weights)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    theirs = {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}
    assert set(mine) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-9)


def test_the_anchors_own_tap_is_never_seen(tiny: Target, draft: DSparkDraft) -> None:
    """Taps at and after every anchor may be anything: the loss does not change."""
    row = _row(tiny, 30, 1)
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=1, seed=0)
    blocks = step.blocks_of(row, 0)
    assert blocks is not None
    loss, _ = step([row], 0)
    row.taps[int(blocks.anchors[0]) :] = 99.0
    again, _ = step([row], 0)
    assert loss.item() == again.item()
    row.taps[int(blocks.anchors[0]) - 1] = 99.0
    moved, _ = step([row], 0)
    assert loss.item() != moved.item()


def test_two_ranks_weigh_every_token_the_same_as_one(tiny: Target, draft: DSparkDraft) -> None:
    rows = [_row(tiny, 40, 1), _row(tiny, 15, 2)]
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=50, seed=0)
    whole, _ = step(rows, 0)
    total = sum(step.denominators([r], 0) for r in rows)
    assert isinstance(total, torch.Tensor)
    split = [step([r], 0, total, 2.0)[0] for r in rows]
    assert sum(float(s.detach()) for s in split) / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_anchors_and_labels_follow_the_mask() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert candidates(mask).tolist() == [2, 3, 6]
    blocks = sample_blocks(mask, 4, 10, seed=0)
    assert blocks is not None
    assert blocks.anchors.tolist() == [2, 3, 6]
    assert blocks.supervised.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert sample_blocks(torch.zeros(5, dtype=torch.bool), 4, 10, seed=0) is None
    few, same = (sample_blocks(mask, 4, 2, seed=7) for _ in range(2))
    assert few is not None and same is not None
    assert few.anchors.tolist() == same.anchors.tolist() and len(few.anchors) == 2
