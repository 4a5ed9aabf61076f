"""The step on a device that is not the CPU: nothing of it stays behind."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from pipeline.target import Target
from pipeline.training.step import TrainStep, Weights
from tests.drafts.samples import small_draft
from tests.training.chip import CHIP, chip, fetched
from tests.training.test_step import KINDS, _row


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with chip():
        a = torch.ones(3, device=CHIP)
        assert fetched(a + 1).tolist() == [2, 2, 2]
        with pytest.raises(AssertionError, match="CPU tensors of shapes"):
            a + torch.arange(3)
        with pytest.raises(AssertionError, match="CPU tensors of shapes"):
            a[torch.tensor([0, 1])]
        assert float((a * torch.tensor(2.0)).sum()) == 6.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_runs_where_the_draft_is(tiny: Target, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_anchors": 6, "seed": 0, "chunk": 16}
    rows = [_row(tiny, 30, 1), _row(tiny, 19, 2)]
    draft = small_draft(tiny, vocabulary=200, **KINDS[kind])
    head = tiny.family.lm_head.weight.detach()
    here = TrainStep(draft, head, Weights(kl=0.1, reverse_kl=0.1, lk=0.1), **settings)
    loss, metrics = here(rows, 3)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with chip():
        draft.to(CHIP)
        there = TrainStep(draft, head, Weights(kl=0.1, reverse_kl=0.1, lk=0.1), **settings)
        sums = there.denominators(rows, 3)
        loss_there, metrics_there = there(rows, 3, sums)
        loss_there.backward()
        nothing, _ = there([], 3, sums)
        nothing.backward()
    assert float(fetched(loss_there.detach())) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name in ("count", "acceptance", "survival", "skipped"):
        torch.testing.assert_close(fetched(getattr(metrics_there, name)), getattr(metrics, name))
    assert float(fetched(nothing.detach())) == 0.0
    for name, parameter in draft.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(fetched(parameter.grad), gradients[name], rtol=1e-4, atol=1e-7)
