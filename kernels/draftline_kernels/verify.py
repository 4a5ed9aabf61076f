"""Verification: how much of each proposal the target keeps, and the token it adds. Exact under both rules.

Shape letters: B requests, K block size, T verification rows in the step (sum of lengths + 1), V target vocabulary,
Vd draft vocabulary.

coupled: the target's own sample y is drawn at every row with noise keyed by (seed, position, token id); a proposed
    token is kept iff it equals y, and y is emitted otherwise (arXiv 2408.07978). For a seed the text depends on nothing
    but the target.
ratio: keep x with probability min(1, p(x) / q(x)), otherwise draw from max(p - q, 0) (Leviathan 2023, Chen 2023).

On CUDA the work is done by `verify_triton`; this module holds the definition and its torch reference for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import uniform
from .overrides import Overrides
from .sampling import Sampling, draw_mass, proposal_stream, stream_pairs
from .truncation import largest, transform

ACCEPT_STREAM = 8
"""Noise stream of the ratio rule's acceptance test."""


@dataclass(frozen=True)
class VerifyResult:
    """What a step decided, one entry per request.

    Attributes:
        accepted: int64 [B]; how many proposed tokens are kept, 0 <= accepted <= lengths.
        next_token: int64 [B]; the token emitted after them (correction or bonus); -1 where `finite` is false.
        finite: bool [B]; false where a row of the request held NaN, +inf or only -inf: nothing of it may be emitted.
    """

    accepted: Tensor
    next_token: Tensor
    finite: Tensor


def _check(
    target_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    cu_lengths: Tensor,
    sampling: Sampling,
    positions: Tensor,
    rule: str,
    draft_logits: Tensor | None,
    d2t: Tensor | None,
    overrides: Overrides | None,
) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and lengths fit each other."""
    proposal_stream(rule)
    if target_logits.dim() != 2 or not target_logits.is_floating_point():
        raise ValueError(f"target_logits are {target_logits.dtype} {list(target_logits.shape)}; expected float [T, V]")
    if tokens.dim() != 2:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; expected [B, K]")
    vocabulary = target_logits.shape[1]
    batch, block = tokens.shape
    shapes = (("lengths", lengths, batch), ("cu_lengths", cu_lengths, batch + 1), ("positions", positions, batch))
    for name, value, size in shapes:
        if value.shape != (size,):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [{size}] for {batch} requests")
    for name, value in (("tokens", tokens), ("lengths", lengths), ("cu_lengths", cu_lengths), ("positions", positions)):
        if value.dtype != torch.int64:
            raise ValueError(f"{name} is {value.dtype}; expected int64")
    if len(sampling) != batch:
        raise ValueError(f"sampling is for {len(sampling)} requests; tokens are for {batch}")
    if target_logits.stride(1) != 1 and target_logits.device.type == "cuda":
        raise ValueError(
            f"target_logits have strides {target_logits.stride()}; on CUDA rows must be dense (contiguous())"
        )
    if draft_logits is not None and rule == "ratio":
        width = vocabulary if d2t is None else d2t.shape[0]
        if draft_logits.shape != (batch, block, width):
            expected = f"[B, K, {'V' if d2t is None else 'Vd'}] = {[batch, block, width]}"
            raise ValueError(f"draft_logits have shape {list(draft_logits.shape)}; expected {expected}")
        if draft_logits.device.type == "cuda" and not draft_logits.is_contiguous():
            raise ValueError(f"draft_logits have strides {draft_logits.stride()}; on CUDA they must be contiguous")
    if overrides is not None:
        overrides.check(batch, target_logits.shape[0], vocabulary, target_logits.device)


def _check_values(
    target_logits: Tensor, tokens: Tensor, lengths: Tensor, cu_lengths: Tensor, overrides: Overrides | None
) -> None:
    """Raise ValueError unless the lengths and tokens fit. On CUDA this would wait for the device: there the kernels
    keep within bounds by themselves."""
    rows, vocabulary = target_logits.shape
    block = tokens.shape[1]
    if bool((lengths < 0).any()) or bool((lengths > block).any()):
        raise ValueError(f"lengths {lengths.tolist()} must be within [0, K] = [0, {block}]")
    if int(cu_lengths[0]) != 0 or int(cu_lengths[-1]) != rows or bool((cu_lengths.diff() != lengths + 1).any()):
        raise ValueError(
            f"cu_lengths {cu_lengths.tolist()} must start at 0, grow by lengths + 1 (lengths {lengths.tolist()}) and "
            f"end at the {rows} rows of target_logits"
        )
    offered = torch.arange(block, device=tokens.device) < lengths.unsqueeze(-1)
    if bool((((tokens < 0) | (tokens >= vocabulary)) & offered).any()):
        raise ValueError(f"an offered token is outside the target vocabulary of {vocabulary}: {tokens.tolist()}")
    if overrides is not None and not torch.equal(overrides.owner, _owners(lengths)):
        rows_of = overrides.owner.bincount(minlength=len(lengths)).tolist()
        raise ValueError(f"overrides have {rows_of} rows per request; lengths + 1 are {(lengths + 1).tolist()}")


def _owners(lengths: Tensor) -> Tensor:
    """int64 [T], the request of each row."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths + 1)


def _coupled_choices(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """The target's own token of every row [N, V] (greedy or drawn) and whether the row is usable."""
    choice, finite = largest(logits)
    rows = (sampling.temperature > 0).nonzero().squeeze(-1)
    if rows.numel():
        chosen, own = (logits, sampling) if rows.numel() == logits.shape[0] else (logits[rows], sampling.select(rows))
        mass = transform(chosen, own.temperature, own.top_k, own.top_p, own.min_p).softmax(dim=-1)
        streams = stream_pairs("target", rows.numel(), logits.device)
        choice[rows] = draw_mass(mass, own.seed, position[rows], streams)
    return choice, finite


def _draft_column(tokens: Tensor, d2t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of target token ids in the draft's logits, and whether the draft has them at all."""
    if d2t is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    column = torch.searchsorted(d2t, tokens.contiguous()).clamp_(max=d2t.shape[0] - 1)
    return column, d2t[column] == tokens


def _residual(p: Tensor, q: Tensor | None, token: Tensor, d2t: Tensor | None) -> Tensor:
    """max(p - q, 0) of rejected rows.

    Args:
        p: float32 [N, V] the target's probabilities.
        q: float32 [N, V or Vd] probabilities that `token` was drawn with; None: one-hot at `token`. Rows that are not
            finite, or that give `token` no mass, count as one-hot too.
        token: int64 [N] the rejected tokens.

    Returns:
        float32 [N, V], not normalised; rows whose residual is zero everywhere are p itself.
    """
    mass = p.clone()
    row = torch.arange(token.shape[0], device=token.device)
    if q is None:
        mass[row, token] = 0.0
    else:
        column, inside = _draft_column(token, d2t)
        usable = inside & (q[row, column] > 0)
        q = torch.where(usable.unsqueeze(-1), q, 0.0)
        if d2t is None:
            mass -= q
        else:
            mass[:, d2t] -= q
        mass.clamp_(min=0.0)
        mass[row, token] = torch.where(usable, mass[row, token], 0.0)
    return torch.where(mass.sum(dim=-1, keepdim=True) > 0, mass, p)


def _verify_ratio(
    target_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    sampling: Sampling,
    positions: Tensor,
    draft_logits: Tensor | None,
    d2t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """accepted and next_token [B] of requests that are all sampled; `target_logits` hold their rows and no others."""
    batch, block = tokens.shape
    device = tokens.device
    slot = torch.arange(block, device=device)
    offered = slot < lengths.unsqueeze(-1)
    request, index = offered.nonzero(as_tuple=True)
    counts = lengths + 1
    start = counts.cumsum(0) - counts
    own = sampling.select(torch.repeat_interleave(torch.arange(batch, device=device), counts))
    p = transform(target_logits, own.temperature, own.top_k, own.top_p, own.min_p).softmax(dim=-1)
    q = None if draft_logits is None else draft_logits.softmax(dim=-1, dtype=torch.float32)
    proposed = tokens[request, index]
    log_p = p[start[request] + index, proposed].log()
    log_q = torch.zeros_like(log_p)
    if q is not None:
        column, inside = _draft_column(proposed, d2t)
        value = q[request, index, column]
        log_q = torch.where(inside & (value > 0), value, 1.0).log()
    u = uniform(sampling.seed[request], positions[request] + 1 + index, torch.zeros_like(index), ACCEPT_STREAM)
    kept = torch.zeros_like(offered)
    kept[request, index] = u.log() < log_p - log_q
    accepted = kept.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    mass = p[start + accepted]
    rejected = accepted < lengths
    rows = rejected.nonzero().squeeze(-1)
    if rows.numel():
        at = accepted[rows]
        mass[rows] = _residual(mass[rows], None if q is None else q[rows, at], tokens[rows, at], d2t)
    streams = torch.where(rejected, stream_pairs("residual", batch, device), stream_pairs("bonus", batch, device))
    return accepted, draw_mass(mass, sampling.seed, positions + 1 + accepted, streams)


def _accept_equal(choice: Tensor, tokens: Tensor, lengths: Tensor, cu_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """accepted and next_token [B] when a token is kept iff it is the target's `choice` [T] of its row."""
    block = tokens.shape[1]
    slot = torch.arange(block, device=tokens.device)
    row = (cu_lengths[:-1].unsqueeze(-1) + slot).clamp_(max=choice.shape[0] - 1)
    equal = (choice[row] == tokens) & (slot < lengths.unsqueeze(-1))
    accepted = equal.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    return accepted, choice[cu_lengths[:-1] + accepted]


def verify(
    target_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    cu_lengths: Tensor,
    sampling: Sampling,
    positions: Tensor,
    rule: str = "coupled",
    draft_logits: Tensor | None = None,
    d2t: Tensor | None = None,
    overrides: Overrides | None = None,
) -> VerifyResult:
    """Keep a prefix of each request's proposal and add one token, so that the target's distribution is unchanged.

    Rows cu_lengths[b] .. cu_lengths[b + 1] of `target_logits` belong to request b; its row i scores the token at
    absolute position positions[b] + 1 + i, after the anchor and the first i proposed tokens.

    Args:
        target_logits: [T, V], any floating dtype, raw (no temperature); -inf is legal. Not modified.
        tokens: int64 [B, K] proposed target token ids; only the first lengths[b] of a row are read.
        lengths: int64 [B] offered tokens per request, 0 (plain decoding) to K.
        cu_lengths: int64 [B + 1], starting at 0, growing by lengths + 1, ending at T.
        sampling: parameters of the B requests.
        positions: int64 [B] absolute position of each anchor.
        rule: "coupled", the proposal drawn with `draw(stream="target")` (any other proposal is exact too), or "ratio",
            the proposal drawn with `draw(stream="draft")` from exactly `draft_logits`.
        draft_logits: ratio only: [B, K, Vd] logits that the proposal was drawn from (after `transform`). None: the
            proposal was chosen without chance (n-gram, greedy draft), q is one-hot. A row that is not finite, or gives
            its own token no mass, is taken as one-hot at that token.
        d2t: int64 [Vd] ascending target ids of the draft's columns; None when they are the target's.
        overrides: bias and penalties of the requests that ask for them, for the same rows; None: no request does.

    Returns:
        VerifyResult; greedy requests (temperature 0) compare with the argmax, lowest id on ties, under both rules.

    Raises:
        ValueError: shapes, dtypes, lengths or the rule do not fit; the message names the argument. The values of
            lengths and tokens are not looked at on CUDA: that would wait for the device.
    """
    _check(target_logits, tokens, lengths, cu_lengths, sampling, positions, rule, draft_logits, d2t, overrides)
    batch = tokens.shape[0]
    device = tokens.device
    if batch == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return VerifyResult(nothing, nothing.clone(), nothing.to(torch.bool))
    if device.type == "cuda":
        from . import verify_triton

        return verify_triton.verify(
            target_logits, tokens, lengths, cu_lengths, sampling, positions, rule, draft_logits, d2t, overrides
        )
    _check_values(target_logits, tokens, lengths, cu_lengths, overrides)
    return reference(
        target_logits, tokens, lengths, cu_lengths, sampling, positions, rule, draft_logits, d2t, overrides
    )


def reference(
    target_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    cu_lengths: Tensor,
    sampling: Sampling,
    positions: Tensor,
    rule: str,
    draft_logits: Tensor | None,
    d2t: Tensor | None,
    overrides: Overrides | None,
) -> VerifyResult:
    """`verify` in torch, on any device, arguments unchecked: what the kernels are held and timed against."""
    if overrides is not None:
        values, row, column = overrides.values(target_logits)
        target_logits = target_logits.to(torch.float32, copy=True)
        target_logits[row, column] = values
    batch = tokens.shape[0]
    device = tokens.device
    owner = _owners(lengths)
    if rule == "coupled" and not sampling.greedy:
        row_position = positions[owner] + 1 + torch.arange(owner.shape[0], device=device) - cu_lengths[owner]
        choice, usable = _coupled_choices(target_logits, sampling.select(owner), row_position)
    else:
        choice, usable = largest(target_logits)
    accepted, next_token = _accept_equal(choice, tokens, lengths, cu_lengths)
    if rule == "ratio" and not sampling.greedy:
        drawn = (sampling.temperature > 0).nonzero().squeeze(-1)
        every = drawn.shape[0] == batch
        accepted[drawn], next_token[drawn] = _verify_ratio(
            target_logits if every else target_logits[sampling.temperature[owner] > 0],
            tokens[drawn],
            lengths[drawn],
            sampling if every else sampling.select(drawn),
            positions[drawn],
            draft_logits if every or draft_logits is None else draft_logits[drawn],
            d2t,
        )
    finite = torch.ones(batch, dtype=torch.bool, device=device)
    finite[owner[~usable]] = False
    return VerifyResult(accepted.masked_fill(~finite, 0), next_token.masked_fill(~finite, -1), finite)
