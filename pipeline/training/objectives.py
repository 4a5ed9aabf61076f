"""The DSpark loss without a [N, V] tensor: CE, total variation and acceptance per row, with their gradients.

For row i with draft logits z = h W^T + m U^T over the draft vocabulary (W the frozen lm_head rows, U = W2 of the Markov
head), q = softmax(z), p the target's probabilities on the draft vocabulary and p_out its mass outside:

    CE_i = -log q[y_i] (labels inside the draft vocabulary only)
    KL_i = sum_j p_j log(p_j / (m q_j)), m = sum_j p_j   (m KL(p/m || q): what p leaves outside weighs nothing)
    L1_i = sum_j |q_j - p_j| + p_out            (twice the total variation; eq. 10 has no 1/2)
    acceptance_i = 1 - L1_i / 2
    d CE / d z = q - onehot(y);   d KL / d z = m q - p;   d L1 / d z_j = q_j (s_j - sum_i q_i s_i),  s = sign(q - p)

Rows are processed in chunks; each chunk's gradients are formed at once and only [N, D], [N, r] and [Vd, r] survive.
Letters: N rows, D hidden, r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class RowStats:
    """Per row, without gradient: ce (0 where the label is outside), kl, l1, acceptance, agree (argmaxes equal): [N]."""

    ce: Tensor
    kl: Tensor
    l1: Tensor
    agree: Tensor

    @property
    def acceptance(self) -> Tensor:
        return 1 - 0.5 * self.l1


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        markov: Tensor | None,
        w2: Tensor | None,
        lm_rows: Tensor,
        target_hidden: Tensor,
        log_normaliser: Tensor,
        target_best: Tensor,
        labels: Tensor,
        ce_weight: Tensor,
        kl_weight: Tensor,
        l1_weight: Tensor,
        softcap: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        compute = lm_rows.dtype
        rows = hidden.shape[0]
        device = hidden.device
        ce, kl, l1 = (torch.zeros(rows, device=device) for _ in range(3))
        agree = torch.zeros(rows, dtype=torch.bool, device=device)
        grad_hidden = torch.empty(rows, hidden.shape[1], device=device)
        grad_markov = None if markov is None else torch.empty(rows, markov.shape[1], device=device)
        grad_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        w2_compute = None if w2 is None else w2.to(compute)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            raw = (hidden[part].to(compute) @ lm_rows.T).float()
            # The softcap applies to lm_head's logits; the Markov bias is added behind it, as in decoding.
            capped = softcap * torch.tanh(raw / softcap) if softcap else raw
            if markov is not None and w2_compute is not None:
                capped = capped + (markov[part].to(compute) @ w2_compute.T).float()
            z = capped
            peak = z.amax(-1, keepdim=True)
            best_q = z.argmax(-1)
            q = (z - peak).exp_()
            mass = q.sum(-1, keepdim=True)
            log_mass = peak + mass.log()
            y = labels[part]
            inside = y >= 0
            column = y.clamp(min=0)[:, None]
            ce[part] = (log_mass - z.gather(-1, column)).squeeze(-1) * inside
            q /= mass
            t = (target_hidden[part].to(compute) @ lm_rows.T).float()
            if softcap:
                t = softcap * torch.tanh(t / softcap)
            agree[part] = best_q == target_best[part]
            log_p = t - log_normaliser[part][:, None]
            p = log_p.exp()
            within = p.sum(-1, keepdim=True)
            outside = (1 - within.squeeze(-1)).clamp_(min=0)
            pull = kl_weight[part][:, None]
            # sum p (log p - z) + m (log mass of q - log m), without another [chunk, Vd] of logarithms.
            inner = log_mass - within.clamp(min=1e-30).log()  # p may stay outside altogether
            apart = torch.einsum("nv,nv->n", p, log_p.sub_(z)) + (within * inner).squeeze(-1)
            kl[part] = apart
            difference = q - p
            l1[part] = difference.abs().sum(-1) + outside
            sign = difference.sign_()
            mean = (q * sign).sum(-1, keepdim=True)
            sign.sub_(mean).mul_(l1_weight[part][:, None])
            own = ce_weight[part] * inside
            sign.add_(own[:, None]).add_(pull * within)
            grad = q.mul_(sign).sub_(p.mul_(pull))
            grad.scatter_add_(-1, column, -own[:, None])
            low = grad.to(compute)
            if markov is not None and w2_compute is not None and grad_markov is not None and grad_w2 is not None:
                grad_markov[part] = (low @ w2_compute).float()
                grad_w2 += (low.T @ markov[part].to(compute)).float()
            if softcap:
                low = (grad * (1 - torch.tanh(raw / softcap) ** 2)).to(compute)
            grad_hidden[part] = (low @ lm_rows).float()
        ctx.save_for_backward(grad_hidden, grad_markov, grad_w2)
        ctx.dtypes = hidden.dtype, None if markov is None else markov.dtype, None if w2 is None else w2.dtype
        ctx.mark_non_differentiable(ce, kl, l1, agree)
        loss = (ce * ce_weight).sum() + (kl * kl_weight).sum() + (l1 * l1_weight).sum()
        return loss, ce, kl, l1, agree

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, markov, w2 = ctx.saved_tensors
        dh, dm, dw = ctx.dtypes
        return (
            (hidden * grad_loss).to(dh),
            None if markov is None else (markov * grad_loss).to(dm),
            None if w2 is None else (w2 * grad_loss).to(dw),
            *[None] * 10,
        )


def vocab_loss(
    hidden: Tensor,
    markov: Tensor | None,
    w2: Tensor | None,
    lm_rows: Tensor,
    target_hidden: Tensor,
    log_normaliser: Tensor,
    target_best: Tensor,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    l1_weight: Tensor,
    *,
    softcap: float = 0.0,
    chunk: int = 1024,
) -> tuple[Tensor, RowStats]:
    """sum_i ce_weight_i CE_i + kl_weight_i KL_i + l1_weight_i L1_i, with gradients to hidden, markov and w2.

    Args:
        hidden: [N, D], the draft's. markov: [N, r], W1 of the token before each slot. w2: [Vd, r].
        lm_rows: [Vd, D] in the compute dtype (products run in it; statistics in fp32).
        target_hidden: [N, D], the target's last hidden state at the position before each label.
        log_normaliser: float32[N], log-sum-exp of the target's logits there over its whole vocabulary.
        target_best: int64[N], draft id of the target's most likely token there, -1 outside the draft vocabulary.
        labels: int64[N], draft ids, -1 outside the draft vocabulary.
        ce_weight, kl_weight, l1_weight: float32[N], complete with denominators.
    """
    loss, ce, kl, l1, agree = _VocabLoss.apply(
        hidden,
        markov,
        w2,
        lm_rows,
        target_hidden,
        log_normaliser,
        target_best,
        labels,
        ce_weight,
        kl_weight,
        l1_weight,
        softcap,
        chunk,
    )
    return loss, RowStats(ce, kl, l1, agree)


def position_weights(block: int, decay: float) -> Tensor:
    """float32[K]: exp(-(k - 1) / decay), k from 1 (eq. 9)."""
    return torch.exp(-torch.arange(block) / decay)
