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
from tests.drafts.conftest import cache_dir, draft, tiny  # noqa: F401
from tests.drafts.samples import small_draft
from tests.training.reference import plain_eagle3


def _row(target: Target, length: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 384, (length,), generator=generator)
    with TapCapture(target.family, [0, 2]) as capture, torch.no_grad():
        hidden = target.family.backbone(ids[None]).last_hidden_state[0]
    mask = torch.zeros(length, dtype=torch.bool)
    mask[5 : length - 3] = True
    mask[9] = False
    return SimpleNamespace(
        sample_id=f"{seed:032x}", input_ids=ids.int(), loss_mask=mask, taps=capture.taps()[0], last_hidden=hidden
    )


def _reference(draft: DSparkDraft, target: Target, rows: list[Any], step: TrainStep) -> torch.Tensor:  # noqa: F811
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
                p = (r.last_hidden[a + k] @ target.family.lm_head.weight.T).softmax(-1)
                l1 = (z.softmax(-1) - p[draft.d2t]).abs().sum() + 1 - p[draft.d2t].sum()
                w = math.exp(-k / 4)
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
                terms.append((w, ce, l1, bce))
    return sum(0.1 * w * ce / inside_weight + (0.9 * l1 + bce) * w / weight for w, ce, l1, bce in terms)  # type: ignore[return-value]


EAGLE3: dict[str, Any] = {
    "algorithm": "eagle3",
    "num_layers": 1,
    "markov_head_type": "none",
    "enable_confidence_head": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "confidence on hidden": {"confidence_head_with_markov": False},
    "windows": {"sliding_windows": [6, 0]},
    "dflash": {
        "algorithm": "dflash",
        "sample_from_anchor": False,
        "markov_head_type": "none",
        "enable_confidence_head": False,
    },
    "eagle3": EAGLE3,
    "eagle3, residual after the norm": {**EAGLE3, "norm_before_residual": True},
}


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_plain_formulation(tiny: Target, kind: str, chunk: int) -> None:  # noqa: F811
    draft = small_draft(tiny, vocabulary=200, **KINDS[kind])  # noqa: F811
    rows = [_row(tiny, 30, 1), _row(tiny, 19, 2)]
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=6, seed=0, chunk=chunk)
    loss, _ = step(rows, 0)
    loss.backward()
    mine = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    reference = _reference(draft, tiny, rows, step)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    theirs = {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}
    assert set(mine) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-9)


def test_the_anchors_own_tap_is_never_seen(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
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


def test_two_ranks_weigh_every_token_the_same_as_one(tiny: Target, draft: DSparkDraft) -> None:  # noqa: F811
    rows = [_row(tiny, 40, 1), _row(tiny, 15, 2)]
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=50, seed=0)
    whole, _ = step(rows, 0)
    sums: list[torch.Tensor] = []
    for r in rows:
        step([r], 0, reduce=lambda t: sums.append(t.clone()) or t)  # type: ignore[func-returns-value]
    total = sums[0] + sums[1]
    split = [step([r], 0, reduce=lambda t: total, world_size=2)[0] for r in rows]
    assert float(sum(split)) / 2 == pytest.approx(whole.item(), rel=1e-5)


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
