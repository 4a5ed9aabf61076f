"""What rows of a vocabulary loss come to: every loss per row, from its logits, and its gradient in their place.

For row i with draft logits z = cap(h W^T) + m U^T over the draft vocabulary (W the lm_head rows, frozen unless they are
the draft's own, U = W2 of the Markov head, cap(x) = c tanh(x / c) where the target softcaps its logits), q =
softmax(z), p the target's probabilities on the draft vocabulary and p_out its mass outside:

    CE_i = -log q[y_i] (labels inside the draft vocabulary only)
    KL_i = sum_j p_j log(p_j / (m q_j)), m = sum_j p_j   (m KL(p/m || q): what p leaves outside weighs nothing)
    L1_i = sum_j |q_j - p_j| + p_out            (twice the total variation; eq. 10 of arXiv 2607.05147 has no 1/2)
    acceptance_i = 1 - L1_i / 2
    d CE / d z = q - onehot(y);   d KL / d z = m q - p;   d L1 / d z_j = q_j (s_j - sum_i q_i s_i),  s = sign(q - p)

and where they are asked for, with a = sum_j min(p_j, q_j) the acceptance, itself without gradient in l:

    RKL_i = sum_j q_j log(q_j / p_j)            (KL(q || p): q is 0 outside)
    LK_i = -log a                               (L^alpha of arXiv 2602.23881; its tangent in a below FLOOR)
    hybrid_i = l KL_i + (1 - l) L1_i / 2, l = exp(-eta a)   (L^lambda there, l by row; eta 3 is its best)
    d RKL / d z_j = q_j (log(q_j / p_j) - RKL);   d LK / d z = d L1 / d z / (2 a)

`row_losses_` runs in Triton on CUDA (`vocab_loss_triton.py`) and here, in torch, elsewhere.
Letters: C rows, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from .truncation import largest

_CACHE_BYTES = 2 << 20
ETA = 3.0
FLOOR = 1e-5  # the gradient of a smaller acceptance is lost in float32 sums over a vocabulary


@dataclasses.dataclass
class RowStats:
    """Per row, without gradient: ce (0 where the label is outside), kl, l1, agree (argmaxes equal): [N] each. rkl and
    overlap (sum of min(p, q), the acceptance to more digits) only where a loss asks for them."""

    ce: Tensor
    kl: Tensor
    l1: Tensor
    agree: Tensor
    rkl: Tensor | None = None
    overlap: Tensor | None = None

    @property
    def acceptance(self) -> Tensor:
        """1 - total variation: the probability that the ratio rule keeps a token drawn from q. float32[N]."""
        return 1 - 0.5 * self.l1


@dataclasses.dataclass(frozen=True)
class RowTargets:
    """What each row is compared with, [N] each; the fields are `vocab_loss`'s arguments of the same names."""

    log_normaliser: Tensor | None
    target_best: Tensor | None
    labels: Tensor
    ce_weight: Tensor
    kl_weight: Tensor
    l1_weight: Tensor
    rkl_weight: Tensor | None = None
    lk_weight: Tensor | None = None
    hybrid_weight: Tensor | None = None

    @property
    def wants_overlap(self) -> bool:
        """Whether a loss is made of the acceptance itself."""
        return self.lk_weight is not None or self.hybrid_weight is not None

    def check(self, rows: int, device: torch.device) -> None:
        """Raises ValueError unless every field is [rows] on `device`, of its documented dtype."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name not in ("labels", "ce_weight", "kl_weight", "l1_weight"):
                continue
            if value.shape != (rows,) or value.device != device:
                raise ValueError(
                    f"{field.name} has shape {list(value.shape)} on {value.device}; expected [{rows}] on {device}"
                )
            whole = field.name in ("target_best", "labels")
            if value.dtype != (torch.int64 if whole else torch.float32):
                raise ValueError(f"{field.name} is {value.dtype}; expected {'int64' if whole else 'float32'}")


_R = TypeVar("_R", RowStats, RowTargets)


def part(of: _R, rows: slice) -> _R:
    """Those rows of statistics or targets, sharing memory."""
    cut: dict[str, Any] = {name: None if v is None else v[rows] for name, v in vars(of).items()}
    return type(of)(**cut)


def row_losses_(
    base: Tensor,
    bias: Tensor | None,
    target: Tensor,
    targets: RowTargets,
    out: RowStats,
    *,
    softcap: float = 0.0,
    eta: float = ETA,
    gradient: bool = True,
) -> None:
    """Statistics of a chunk of rows from their logits; the logits are overwritten with the loss's gradient.

    Args:
        base: [C, Vd], lm_head's logits before the softcap. Overwritten with d loss / d base (`gradient`), or undefined.
        bias: [C, Vd], the Markov head's, added behind the softcap; None: none. Overwritten with d loss / d bias.
        target: [C, Vd], the target's logits before the softcap. Overwritten with undefined values.
        targets: C rows. out: [C] tensors, written; those that the targets ask for.
        softcap: 0 for none. eta: of the hybrid.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit; the message names the argument.
    """
    _check_rows(base, bias, target, targets)
    for name, asked in (("rkl", targets.rkl_weight is not None), ("overlap", targets.wants_overlap)):
        if asked and getattr(out, name) is None:
            raise ValueError(f"out.{name} is None, but a weight asks for it: give a float32 [{base.shape[0]}]")
    if base.device.type == "cuda":
        from . import vocab_loss_triton

        vocab_loss_triton.row_losses_(base, bias, target, targets, out, softcap=softcap, eta=eta, gradient=gradient)
        return
    # A few rows at a time, so that what one step writes the next one finds in the cache.
    group = max(1, _CACHE_BYTES // (base.shape[1] * 4))
    for start in range(0, base.shape[0], group):
        rows = slice(start, start + group)
        more = None if bias is None else bias[rows]
        reference_(base[rows], more, target[rows], part(targets, rows), part(out, rows), softcap, gradient, eta)


def reference_(
    base: Tensor,
    bias: Tensor | None,
    target: Tensor,
    targets: RowTargets,
    out: RowStats,
    softcap: float,
    gradient: bool,
    eta: float = ETA,
) -> None:
    """`row_losses_` in torch, on any device, arguments unchecked. Tensors are reused: the first touch of a fresh page
    costs as much as the arithmetic on it."""
    # float32 inputs are worked on in place; narrower ones in a float32 copy.
    z, t = base.float(), target.float()
    slope = None
    if softcap:
        z.div_(softcap).tanh_()
        if gradient:
            slope = z.square().neg_().add_(1.0)
        z.mul_(softcap)
        t = t.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        z += bias
    best, _ = largest(z)
    target_best, normaliser = targets.target_best, targets.log_normaliser
    if target_best is None:
        target_best, _ = largest(t)
    if normaliser is None:
        normaliser = t.logsumexp(-1)
    out.agree.copy_(best == target_best)
    z -= z.gather(-1, best[:, None])
    inside = targets.labels >= 0
    column = targets.labels.clamp(min=0)[:, None]
    at_label = z.gather(-1, column).squeeze(-1)
    t -= normaliser[:, None]
    p = t.exp()
    within = p.sum(-1)
    # sum p (log p - log q) + m log(1 / m), in three sums instead of another [C, Vd] of logarithms.
    t.sub_(z)
    ratio = None if targets.rkl_weight is None else t.clone()
    apart = t.mul_(p).sum(-1)
    q = z.exp_()
    mass = q.sum(-1, keepdim=True)
    q /= mass
    log_mass = mass.log_().squeeze(-1)
    out.ce.copy_((log_mass - at_label).mul_(inside))
    out.kl.copy_(apart.add_(within * (log_mass - within.clamp(min=1e-30).log_())))  # p may stay outside altogether
    rkl_weight, rkl = targets.rkl_weight, out.rkl
    if ratio is not None and rkl is not None:
        ratio.add_(log_mass[:, None]).neg_()  # log(q / p)
        torch.sum(torch.mul(q, ratio, out=t), -1, out=rkl)
    kl_weight, l1_weight = targets.kl_weight, targets.l1_weight
    if targets.wants_overlap and out.overlap is not None:
        torch.sum(torch.minimum(q, p, out=t), -1, out=out.overlap)
        if targets.lk_weight is not None:
            l1_weight = l1_weight + targets.lk_weight / (2 * out.overlap.clamp(min=FLOOR))
        if targets.hybrid_weight is not None:
            share = torch.exp(-eta * out.overlap)
            kl_weight = kl_weight + targets.hybrid_weight * share
            l1_weight = l1_weight + targets.hybrid_weight * (1 - share) / 2
    torch.sub(q, p, out=t)
    scratch = t.abs()
    out.l1.copy_(scratch.sum(-1).add_((1 - within).clamp_(min=0)))
    if not gradient:
        return
    sign = t.sign_()
    mean = torch.mul(q, sign, out=scratch).sum(-1)
    own = targets.ce_weight * inside
    shift = own + kl_weight * within - l1_weight * mean
    sign.mul_(l1_weight[:, None])
    if ratio is not None and rkl_weight is not None and rkl is not None:
        sign.addcmul_(ratio, rkl_weight[:, None])
        shift -= rkl_weight * rkl
    sign.add_(shift[:, None])
    grad = q.mul_(sign).addcmul_(p, kl_weight[:, None], value=-1)
    grad.scatter_add_(-1, column, -own[:, None])
    if bias is not None:
        bias.copy_(grad)
    if slope is not None:
        grad.mul_(slope)
    if grad is not base:
        base.copy_(grad)


def _check_rows(base: Tensor, bias: Tensor | None, target: Tensor, targets: RowTargets) -> None:
    """Raises ValueError, naming the argument, unless the tensors of `row_losses_` fit each other."""
    if base.dim() != 2 or base.dtype not in (torch.float32, torch.bfloat16, torch.float16) or base.shape[1] == 0:
        raise ValueError(f"base is {base.dtype} {list(base.shape)}; expected float32, bfloat16 or float16 [C, Vd > 0]")
    for name, value in (("base", base), ("bias", bias), ("target", target)):
        if value is None:
            continue
        if value.shape != base.shape or value.dtype != base.dtype or value.device != base.device:
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)} on {value.device}; "
                f"base is {base.dtype} {list(base.shape)} on {base.device}, and they must agree"
            )
        if value.stride(1) != 1 or value.stride(0) < value.shape[1]:
            raise ValueError(f"{name} has strides {value.stride()}; it is overwritten row by row: pass a dense tensor")
    targets.check(base.shape[0], base.device)
