"""The vocabulary loss without a [N, V] tensor: CE, both KLs, total variation and acceptance per row, with gradients.

Rows are processed in chunks. A chunk's logits come from plain matrix products (the device's own are faster than any
product inside a kernel, which would also have to be made twice: the gradient needs the statistics of the whole row);
`row_losses_` (row_losses.py, which also says what each loss is) reduces them and leaves their gradient in their place,
and a second product takes it back to the hidden states. Two or three chunk-sized buffers, [N, D], [N, r] and [Vd, r]
are all that ever exists, and [Vd, D] where the rows of lm_head are trained.

Letters: N rows, C rows of a chunk, D hidden, r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .row_losses import ETA, FLOOR, RowStats, RowTargets, part, row_losses_

_CPU_BYTES = 80 << 20
_CUDA_BYTES = 128 << 20


def rows_per_chunk(rows: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows of a chunk: as equal parts of all rows as keep a buffer of logits within 80 MiB on CPU, 128 MiB on CUDA.

    lm_rows are read (and on CPU repacked) once per chunk, so chunks are as large as memory is worth; a fixed rule, so
    that sums don't depend on how much happens to be free.
    """
    budget = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    most = max(1, budget // (vocabulary * itemsize))
    return -(-rows // max(1, -(-rows // most))) or 1


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
            some = slice(start, min(start + chunk, rows))
            base, target, *more = buffers[:, : some.stop - start].unbind(0)
            seen = hidden[some].to(compute)
            torch.mm(seen, lm_rows.T, out=base)
            torch.mm(target_hidden[some].to(compute), target_rows.T, out=target)
            bias = more[0] if more else None
            if codes is not None:
                if bias is not None:
                    torch.mm(codes[0][some], codes[1].T, out=bias)
                else:
                    base.addmm_(codes[0][some], codes[1].T)
            to, out = part(targets, some), part(stats, some)
            row_losses_(base, bias, target, to, out, softcap=softcap, eta=eta, gradient=gradient)
            if grad_hidden is not None:
                grad_hidden[some] = base @ lm_rows
            if grad_rows is not None:
                _add_product(grad_rows, base, seen)
            if codes is not None and grad_markov is not None and grad_w2 is not None:
                back = base if bias is None else bias
                grad_markov[some] = back @ codes[1]
                _add_product(grad_w2, back, codes[0][some])
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
    targets.check(rows, device)
    if device.type == "cpu" and rows and int(labels.max()) >= vocabulary:
        raise ValueError(f"a label is {int(labels.max())}; the draft vocabulary has {vocabulary} ids (-1: outside)")
    size = chunk or rows_per_chunk(rows, vocabulary, lm_rows.element_size(), device)
    theirs = (lm_rows if target_rows is None else target_rows).detach().to(lm_rows.dtype)
    loss, *stats = _VocabLoss.apply(hidden, markov, w2, lm_rows, theirs, target_hidden, targets, softcap, eta, size)
    return loss, RowStats(*stats)
