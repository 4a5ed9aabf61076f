"""The vocabulary loss's kernel gives the float64 loss and its gradient, row by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from draftline_kernels import RowStats, vocab_loss, vocab_loss_triton
from draftline_kernels.row_losses import ETA, RowTargets

N = 9


def exact(
    base: Tensor, bias: Tensor | None, target: Tensor, to: RowTargets, softcap: float
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Statistics and gradients (of base, of bias) by autograd in float64, from the definitions."""

    def cap(x: Tensor) -> Tensor:
        return softcap * torch.tanh(x / softcap) if softcap else x

    base = base.double().requires_grad_()
    bias = None if bias is None else bias.double().requires_grad_()
    z = cap(base) if bias is None else cap(base) + bias
    log_q, log_p = z.log_softmax(-1), cap(target.double()) - to.log_normaliser.double()[:, None]
    p, q, inside = log_p.exp(), log_q.exp(), to.labels >= 0
    within = p.sum(-1)
    ce = -log_q.gather(-1, to.labels.clamp(min=0)[:, None]).squeeze(-1) * inside
    kl = (p * (log_p - log_q)).nan_to_num().sum(-1) - within * within.clamp(min=1e-30).log()
    l1 = (q - p).abs().sum(-1) + (1 - within).clamp(min=0)
    rkl, overlap = (q * (log_q - log_p)).sum(-1), torch.minimum(p, q).sum(-1)
    share = torch.exp(-ETA * overlap.detach())
    terms = [ce, kl, l1, rkl, -overlap.log(), share * kl + (1 - share) * l1 / 2]
    weights = [to.ce_weight, to.kl_weight, to.l1_weight, to.rkl_weight, to.lk_weight, to.hybrid_weight]
    sum(t @ w.double() for t, w in zip(terms, weights, strict=True) if w is not None).backward()  # type: ignore[union-attr]
    values = {"ce": ce, "kl": kl, "l1": l1, "agree": z.argmax(-1) == to.target_best}
    values |= {} if to.rkl_weight is None else {"rkl": rkl, "overlap": overlap}
    return {k: v.detach() for k, v in values.items()}, base.grad, None if bias is None else bias.grad


def case(  # type: ignore[type-arg]
    device: torch.device, width: int, *, bias: bool, softcap: float, spread: float = 3.0, terms: int = 3
) -> tuple:
    """Logits and targets in which every third label is outside, one row weighs nothing, and some p is outside."""
    g = torch.Generator().manual_seed(width)
    base, added, target = (torch.randn(N, width, generator=g) * spread for _ in range(3))
    capped = softcap * torch.tanh(target / softcap) if softcap else target
    labels = torch.randint(0, width, (N,), generator=g)
    labels[::3] = -1
    weights = torch.rand(terms, N, generator=g)
    weights[:, 4] = 0
    z = (softcap * torch.tanh(base / softcap) if softcap else base) + (added if bias else 0)
    best = torch.where(torch.arange(N) % 2 == 0, z.argmax(-1), -1)
    outside = torch.rand(N, generator=g)
    to = RowTargets(capped.logsumexp(-1) + outside, best, labels, *weights)
    to = RowTargets(*(None if v is None else v.to(device) for v in vars(to).values()))
    return base.to(device), added.to(device) if bias else None, target.to(device), to


def run(base: Tensor, bias: Tensor | None, target: Tensor, to: RowTargets, softcap: float, **options: int) -> tuple:  # type: ignore[type-arg]
    """The kernel on copies; results start out poisoned."""
    base, target = base.clone(), target.clone()
    bias = None if bias is None else bias.clone()
    poison = [torch.full((len(base),), float("nan"), device=base.device) for _ in range(5)]
    out = RowStats(*poison[:3], torch.zeros(len(base), dtype=torch.bool, device=base.device), *poison[3:])
    vocab_loss_triton.row_losses_(base, bias, target, to, out, softcap=softcap, **options)
    return out, base, bias


@pytest.mark.parametrize("width", [1, 64, 203])
@pytest.mark.parametrize(("bias", "softcap"), [(False, 0.0), (True, 0.0), (True, 5.0), (False, 5.0)])
def test_values_and_gradients(device: torch.device, width: int, bias: bool, softcap: float) -> None:
    """Rows of one tile, of a whole number of tiles, and with a ragged end."""
    base, added, target, to = case(device, width, bias=bias, softcap=softcap)
    wanted, grad_base, grad_bias = exact(base, added, target, to, softcap)
    out, got_base, got_bias = run(base, added, target, to, softcap, tile=64)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(out, name).double(), value.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_base.double(), grad_base, rtol=1e-4, atol=1e-6)
    if bias:
        torch.testing.assert_close(got_bias.double(), grad_bias, rtol=1e-4, atol=1e-6)
    assert float(got_base[4].abs().max()) == 0, "a row without weight has no gradient"


@pytest.mark.parametrize(("bias", "softcap"), [(True, 0.0), (True, 5.0)])
def test_reverse_kl_and_acceptance_losses(device: torch.device, bias: bool, softcap: float) -> None:
    base, added, target, to = case(device, 203, bias=bias, softcap=softcap, terms=6)
    wanted, grad_base, grad_bias = exact(base, added, target, to, softcap)
    out, got_base, got_bias = run(base, added, target, to, softcap, tile=64)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(out, name).double(), value.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_base.double(), grad_base, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(got_bias.double(), grad_bias, rtol=1e-4, atol=2e-6)


def test_extreme_logits(device: torch.device) -> None:
    """Spreads at which probabilities underflow, and a row whose p is all outside."""
    base, _, target, to = case(device, 150, bias=False, softcap=0.0, spread=300.0)
    to.log_normaliser[1] += 1000.0
    wanted, grad, _ = exact(base, None, target, to, 0.0)
    out, got, _ = run(base, None, target, to, 0.0, tile=32)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(out, name).double(), value.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(device: torch.device) -> None:
    base, added, target, to = case(device, 500, bias=True, softcap=0.0)
    base, added, target = (x.bfloat16() for x in (base, added, target))
    wanted, grad, _ = exact(base, added, target, to, 0.0)
    out, got, got_bias = run(base, added, target, to, 0.0, tile=128)
    assert got.dtype == torch.bfloat16
    for name in ("ce", "kl", "l1"):
        torch.testing.assert_close(getattr(out, name).double(), wanted[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), grad, rtol=1e-2, atol=1e-6)
    assert torch.equal(got, got_bias)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_whole_vocabulary_needs_no_normaliser(device: torch.device, softcap: float) -> None:
    """Normaliser and best token come from the target's logits: as when they are given."""
    base, added, target, to = case(device, 203, bias=True, softcap=softcap)
    capped = softcap * torch.tanh(target.double() / softcap) if softcap else target.double()
    to = dataclasses.replace(to, log_normaliser=capped.logsumexp(-1).float(), target_best=capped.argmax(-1))
    wanted, grad, _ = exact(base, added, target, to, softcap)
    open_ended = dataclasses.replace(to, log_normaliser=None, target_best=None)
    out, got, _ = run(base, added, target, open_ended, softcap, tile=64)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(out, name).double(), value.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-6)


def test_statistics_alone(device: torch.device) -> None:
    base, _, target, to = case(device, 90, bias=False, softcap=0.0)
    wanted, _, _ = exact(base, None, target, to, 0.0)
    out, got, _ = run(base, None, target, to, 0.0, gradient=False)
    torch.testing.assert_close(out.l1.double(), wanted["l1"], rtol=1e-5, atol=1e-5)
    assert torch.equal(got, base), "nothing is written"


def test_no_rows(device: torch.device) -> None:
    base, _, target, to = case(device, 8, bias=False, softcap=0.0)
    none = RowTargets(
        *(
            getattr(to, n)[:0]
            for n in ("log_normaliser", "target_best", "labels", "ce_weight", "kl_weight", "l1_weight")
        )
    )
    out, _, _ = run(base[:0], None, target[:0], none, 0.0)
    assert out.l1.shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_on_the_gpu_as_on_the_cpu(softcap: float, compute: torch.dtype) -> None:
    """The public function at a real vocabulary's width, both dispatches."""
    g = torch.Generator().manual_seed(0)
    n, v, d, r = 70, 40_000, 64, 16
    hidden, codes, seen = (torch.randn(n, k, generator=g) for k in (d, r, d))
    w2, rows = torch.randn(v, r, generator=g) * 0.2, torch.randn(v, d, generator=g) * 0.2
    labels, weight = torch.randint(-1, v, (n,), generator=g), torch.rand(n, generator=g)
    logits = (seen.to(compute) @ rows.to(compute).T).float()
    norm = (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(-1)
    results = []
    for device in ("cpu", "cuda"):
        moved = [x.to(device).requires_grad_() for x in (hidden, codes, w2)]
        rest = [x.to(device) for x in (rows.to(compute), seen, norm, labels, labels, weight, weight, weight)]
        loss, stats = vocab_loss(*moved, *rest, softcap=softcap, chunk=32)
        loss.backward()
        results.append([loss.detach().cpu(), stats.l1.cpu(), *(x.grad.cpu() for x in moved)])
    loose = {"rtol": 5e-2, "atol": 5e-3} if compute == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, **loose)
