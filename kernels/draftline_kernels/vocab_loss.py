"""The vocabulary loss without a [N, V] tensor: CE, both KLs, total variation and acceptance per row, with gradients.

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

Rows are processed in chunks. A chunk's logits come from plain matrix products (the device's own are faster than any
product inside a kernel, which would also have to be made twice: the gradient needs the statistics of the whole row);
`row_losses_` reduces them and leaves their gradient in their place, and a second product takes it back to the hidden
states. Two or three chunk-sized buffers, [N, D], [N, r] and [Vd, r] are all that ever exists, and [Vd, D] where the
rows of lm_head are trained.

`row_losses_` runs in Triton on CUDA and here, in torch, elsewhere.
Letters: N rows, C rows of a chunk, D hidden, r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from .sampling import largest

_CPU_BYTES = 80 << 20
_CUDA_BYTES = 128 << 20
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


_R = TypeVar("_R", RowStats, RowTargets)


def _part(of: _R, rows: slice) -> _R:
    cut: dict[str, Any] = {name: None if v is None else v[rows] for name, v in vars(of).items()}
    return type(of)(**cut)


def rows_per_chunk(rows: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows of a chunk: as equal parts of all rows as keep a buffer of logits within 80 MiB on CPU, 128 MiB on CUDA.

    lm_rows are read (and on CPU repacked) once per chunk, so chunks are as large as memory is worth; a fixed rule, so
    that sums don't depend on how much happens to be free.
    """
    budget = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    most = max(1, budget // (vocabulary * itemsize))
    return -(-rows // max(1, -(-rows // most))) or 1


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
        part = slice(start, start + group)
        more = None if bias is None else bias[part]
        reference_(base[part], more, target[part], _part(targets, part), _part(out, part), softcap, gradient, eta)


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
    _check_targets(targets, base.shape[0], base.device)


def _check_targets(targets: RowTargets, rows: int, device: torch.device) -> None:
    """Raises ValueError unless every field is [rows] on `device`, of its documented dtype."""
    for field in dataclasses.fields(targets):
        value = getattr(targets, field.name)
        if value is None and field.name not in ("labels", "ce_weight", "kl_weight", "l1_weight"):
            continue
        if value.shape != (rows,) or value.device != device:
            raise ValueError(
                f"{field.name} has shape {list(value.shape)} on {value.device}; expected [{rows}] on {device}"
            )
        whole = field.name in ("target_best", "labels")
        if value.dtype != (torch.int64 if whole else torch.float32):
            raise ValueError(f"{field.name} is {value.dtype}; expected {'int64' if whole else 'float32'}")


def _add_product(into: Tensor, rows: Tensor, codes: Tensor) -> None:
    """into += rows^T codes; products of narrow numbers are summed over chunks in float32."""
    if rows.dtype == torch.float32:
        into.addmm_(rows.T, codes)
    else:
        into += rows.T @ codes


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        markov: Tensor | None,
        w2: Tensor | None,
        lm_rows: Tensor,
        target_rows: Tensor,
        target_hidden: Tensor,
        targets: RowTargets,
        softcap: float,
        eta: float,
        chunk: int,
    ) -> tuple[Tensor | None, ...]:
        compute, device, rows = lm_rows.dtype, lm_rows.device, hidden.shape[0]
        gradient = any(ctx.needs_input_grad[:4])
        ce, kl, l1, rkl, overlap = (torch.zeros(rows, device=device) for _ in range(5))
        stats = RowStats(ce, kl, l1, torch.zeros(rows, dtype=torch.bool, device=device))
        stats.rkl = None if targets.rkl_weight is None else rkl
        stats.overlap = overlap if targets.wants_overlap else None
        grad_hidden = grad_markov = grad_w2 = grad_rows = None
        if ctx.needs_input_grad[3]:
            grad_rows = torch.zeros(lm_rows.shape, device=device)
        if gradient:
            grad_hidden = torch.empty(rows, hidden.shape[1], device=device)
            if markov is not None and w2 is not None:
                grad_markov = torch.empty(rows, markov.shape[1], device=device)
                grad_w2 = torch.zeros(w2.shape, device=device)
        codes = None if markov is None or w2 is None else (markov.to(compute), w2.to(compute))
        # Behind a softcap the two logits have different gradients; narrow ones would be rounded twice if added here.
        apart = codes is not None and (bool(softcap) or compute != torch.float32)
        buffers = torch.empty(2 + apart, min(chunk, rows), lm_rows.shape[0], dtype=compute, device=device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            base, target, *more = buffers[:, : part.stop - start].unbind(0)
            seen = hidden[part].to(compute)
            torch.mm(seen, lm_rows.T, out=base)
            torch.mm(target_hidden[part].to(compute), target_rows.T, out=target)
            bias = more[0] if more else None
            if codes is not None:
                if bias is not None:
                    torch.mm(codes[0][part], codes[1].T, out=bias)
                else:
                    base.addmm_(codes[0][part], codes[1].T)
            to, out = _part(targets, part), _part(stats, part)
            row_losses_(base, bias, target, to, out, softcap=softcap, eta=eta, gradient=gradient)
            if grad_hidden is not None:
                grad_hidden[part] = base @ lm_rows
            if grad_rows is not None:
                _add_product(grad_rows, base, seen)
            if codes is not None and grad_markov is not None and grad_w2 is not None:
                back = base if bias is None else bias
                grad_markov[part] = back @ codes[1]
                _add_product(grad_w2, back, codes[0][part])
        ctx.save_for_backward(grad_hidden, grad_markov, grad_w2, grad_rows)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, markov, w2, lm_rows)]
        ctx.mark_non_differentiable(*(t for t in vars(stats).values() if t is not None))
        loss = (ce * targets.ce_weight).sum() + (kl * targets.kl_weight).sum() + (l1 * targets.l1_weight).sum()
        if targets.rkl_weight is not None:
            loss = loss + (rkl * targets.rkl_weight).sum()
        if targets.lk_weight is not None:
            lk = (1 - overlap / FLOOR).clamp(min=0) - overlap.clamp(min=FLOOR).log()
            loss = loss + (lk * targets.lk_weight).sum()
        if targets.hybrid_weight is not None:
            share = torch.exp(-eta * overlap)
            loss = loss + ((share * kl + (1 - share) * l1 / 2) * targets.hybrid_weight).sum()
        return loss, *vars(stats).values()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place: the gradients of w2 and lm_rows are as large as they. (A second backward is refused by autograd.)
        grads = (
            None if saved is None else saved.mul_(grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *[None] * 6)


def vocab_loss(
    hidden: Tensor,
    markov: Tensor | None,
    w2: Tensor | None,
    lm_rows: Tensor,
    target_hidden: Tensor,
    log_normaliser: Tensor | None,
    target_best: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    l1_weight: Tensor,
    *,
    rkl_weight: Tensor | None = None,
    lk_weight: Tensor | None = None,
    hybrid_weight: Tensor | None = None,
    eta: float = ETA,
    softcap: float = 0.0,
    chunk: int | None = None,
    target_rows: Tensor | None = None,
) -> tuple[Tensor, RowStats]:
    """sum_i ce_weight_i CE_i + kl_weight_i KL_i + l1_weight_i L1_i, and RKL, LK and hybrid likewise, with gradients to
    hidden, markov, w2 and lm_rows.

    Args:
        hidden: [N, D], the draft's. markov: [N, r], codes of the Markov head at each slot. w2: [Vd, r]. Both or none.
        lm_rows: [Vd, D] in the compute dtype, float32, bfloat16 or float16 (products run in it; statistics in fp32).
        target_hidden: [N, D], the target's last hidden state at the position before each label.
        log_normaliser: float32[N], log-sum-exp of the target's logits there over its whole vocabulary; None
            where the draft vocabulary is the whole one, so that the logits formed here tell it.
        target_best: int64[N], draft id of the target's most likely token there, -1 outside the draft vocabulary;
            None likewise.
        labels: int64[N], draft ids, -1 outside the draft vocabulary.
        ce_weight, kl_weight, l1_weight: float32[N], complete with denominators.
        rkl_weight, lk_weight, hybrid_weight: likewise; None: not computed. eta: of the hybrid, at least 0.
        softcap: c of the target's c tanh(logits / c), 0 for none.
        chunk: rows at once; None: `rows_per_chunk`.
        target_rows: [Vd, D] like lm_rows, what the target's logits are made of where lm_rows are the draft's own; None:
            lm_rows.

    Returns:
        The scalar loss (float32) and the rows' statistics. Without an input that asks for gradients none is formed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a label is beyond the draft vocabulary (CPU only: on CUDA
            looking would wait for the device), eta < 0 or chunk < 1; the message names the argument.
    """
    rows, device = hidden.shape[0], lm_rows.device
    vocabulary, width = lm_rows.shape
    if (markov is None) != (w2 is None):
        raise ValueError("markov and w2 belong together: give both or neither")
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("hidden", hidden, (rows, width)),
        ("target_hidden", target_hidden, (rows, width)),
    ]
    if target_rows is not None:
        wanted.append(("target_rows", target_rows, (vocabulary, width)))
    if markov is not None:
        wanted += [("markov", markov, (rows, markov.shape[-1])), ("w2", w2, (vocabulary, markov.shape[-1]))]
    for name, value, shape in wanted:
        if value is not None and (value.shape != shape or value.device != device):
            raise ValueError(
                f"{name} has shape {list(value.shape)} on {value.device}; expected {list(shape)} on {device} "
                f"(lm_rows are {list(lm_rows.shape)})"
            )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1, or None for the default")
    if not eta >= 0:
        raise ValueError(f"eta {eta} must be at least 0")
    more = rkl_weight, lk_weight, hybrid_weight
    targets = RowTargets(log_normaliser, target_best, labels, ce_weight, kl_weight, l1_weight, *more)
    _check_targets(targets, rows, device)
    if device.type == "cpu" and rows and int(labels.max()) >= vocabulary:
        raise ValueError(f"a label is {int(labels.max())}; the draft vocabulary has {vocabulary} ids (-1: outside)")
    size = chunk or rows_per_chunk(rows, vocabulary, lm_rows.element_size(), device)
    theirs = (lm_rows if target_rows is None else target_rows).detach().to(lm_rows.dtype)
    loss, *stats = _VocabLoss.apply(hidden, markov, w2, lm_rows, theirs, target_hidden, targets, softcap, eta, size)
    return loss, RowStats(*stats)
