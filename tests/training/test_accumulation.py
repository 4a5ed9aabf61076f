"""Microbatches and ranks: what a step's gradient is, however its rows are dealt out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.target import Target
from pipeline.training.engine import Objective, take_step
from pipeline.training.step import StepMetrics, TrainStep, Weights
from tests.drafts.samples import small_draft
from tests.training.test_step import EAGLE3, _row

LENGTHS = (30, 14, 47, 21)


class _Engine:
    """What the loop uses of DeepSpeed: the mean over microbatches is taken of gradients, the step is its own."""

    def __init__(self, step: TrainStep, accumulate: int) -> None:
        self.module, self.accumulate, self.steps = Objective(step), accumulate, 0

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self) -> None:
        self.steps += 1

    def was_step_applied(self) -> bool:
        return True


def _gradients(
    target: Target, dealt: list[list[list[Any]]], normalise: str = "tokens", **kind: Any
) -> tuple[dict[str, torch.Tensor], StepMetrics]:
    """Mean gradient over ranks, and summed metrics, of rows dealt to [rank][microbatch]."""
    draft = small_draft(target, vocabulary=200, **kind)
    step = TrainStep(draft, target.family.lm_head.weight, Weights(kl=0.2), num_anchors=50, seed=0)
    world, accumulate = len(dealt), len(dealt[0])
    own = [torch.stack([step.denominators(rows, 5) for rows in parts]) for parts in dealt]
    total: StepMetrics | None = None
    for parts in dealt:
        engine = _Engine(step, accumulate)
        metrics, apply = take_step(engine, step, parts, 5, normalise, lambda _: torch.stack(own).sum(0), world)
        assert engine.steps == accumulate - 1, "the weights wait until the loss was looked at"
        apply()
        total = metrics if total is None else total + metrics
    assert total is not None
    return {n: p.grad / world for n, p in draft.named_parameters() if p.grad is not None}, total


def _close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-5 * float(b[n].abs().max()) + 1e-9) for n in a)


@pytest.mark.parametrize("kind", [{}, EAGLE3], ids=["dspark", "eagle3"])
def test_tokens_weigh_the_same_however_rows_are_dealt(tiny: Target, kind: dict[str, Any]) -> None:
    a, b, c, d = (_row(tiny, n, i) for i, n in enumerate(LENGTHS, start=1))
    whole, metrics = _gradients(tiny, [[[a, b, c, d]]], **kind)
    for dealt in ([[[a, b], [c, d]]], [[[a], [b]], [[c], [d]]], [[[a, b, c], []], [[], [d]]]):
        split, parts = _gradients(tiny, dealt, **kind)
        assert _close(split, whole)
        assert parts.loss == pytest.approx(metrics.loss, rel=1e-5)
        assert torch.equal(parts.count, metrics.count)


def test_microbatches_weigh_the_same_when_asked_for(tiny: Target) -> None:
    """DeepSpec's form: the mean of the means of microbatches, each over all ranks."""
    a, b, c, d = (_row(tiny, n, i) for i, n in enumerate(LENGTHS, start=1))
    first, m1 = _gradients(tiny, [[[a, b]]])
    second, m2 = _gradients(tiny, [[[c, d]]])
    mean = {n: (first[n] + second[n]) / 2 for n in first}
    for dealt in ([[[a, b], [c, d]]], [[[a], [c]], [[b], [d]]]):
        split, metrics = _gradients(tiny, dealt, "microbatches")
        assert _close(split, mean)
        assert metrics.loss == pytest.approx((m1.loss + m2.loss) / 2, rel=1e-5)
    assert not _close(mean, _gradients(tiny, [[[a, b], [c, d]]])[0]), "rows of unequal length tell the two apart"


def test_a_sample_without_a_supervised_pair_is_counted_and_changes_nothing(tiny: Target) -> None:
    row, masked = _row(tiny, 30, 1), _row(tiny, 20, 2)
    masked.loss_mask[:] = False
    alone, before = _gradients(tiny, [[[row]]])
    beside, after = _gradients(tiny, [[[row], [masked]]])
    assert _close(beside, alone)
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert before.summary()["skipped_samples"] == 0
    assert after.summary()["skipped_samples"] == 1


@pytest.mark.parametrize("kind", [{}, {"markov_head_type": "rnn"}, EAGLE3], ids=["dspark", "rnn", "eagle3"])
def test_a_rank_without_a_block_still_runs_every_module(tiny: Target, kind: dict[str, Any]) -> None:
    """ZeRO-3 gathers a module's weights as it runs: a rank that left one out would leave the others waiting."""
    draft = small_draft(tiny, vocabulary=200, **kind)
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=6, seed=0)
    ran: list[str] = []
    for name, module in draft.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    loss, _ = step([_row(tiny, 30, 1)], 0)
    loss.backward()
    usual, reached = list(ran), {n for n, p in draft.named_parameters() if p.grad is not None}
    ran.clear()
    draft.zero_grad(set_to_none=True)
    loss, metrics = step([], 0, torch.tensor([3.0, 2.0], dtype=torch.float64))
    loss.backward()
    assert ran == usual
    assert {n for n, p in draft.named_parameters() if p.grad is not None} == reached
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in draft.parameters() if p.grad is not None)
    assert float(metrics.count.sum()) == 0
