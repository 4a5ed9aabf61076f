"""Which tokens a request's sampling leaves: temperature, then min-p, top-k and top-p, in torch.

Shape letters: N rows, V vocabulary (target or draft).
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRIPE = 256
_NARROW = 64


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax of each row [N, V], lowest id on ties, and whether the row is usable (its largest entry is finite).

    A row with NaN, with +inf or with nothing but -inf is not usable; its argmax is still a valid id.
    """
    width = logits.shape[-1]
    whole = width // _STRIPE * _STRIPE
    if logits.device.type == "cpu" and whole:
        # torch's argmax is not vectorised on CPU, its amax is: find the stripe first, then look inside it only.
        stripes = logits[:, :whole].reshape(logits.shape[0], -1, _STRIPE).amax(dim=-1)
        if whole < width:
            stripes = torch.cat([stripes, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
        low = stripes.argmax(dim=-1, keepdim=True) * _STRIPE
        column = low + torch.arange(_STRIPE, device=logits.device)
        beyond = column >= width
        inside = logits.gather(-1, column.clamp_(max=width - 1)).masked_fill_(beyond, float("-inf"))
        best = low + inside.argmax(dim=-1, keepdim=True)
    else:
        best = logits.argmax(dim=-1, keepdim=True)
    return best.squeeze(-1), logits.gather(-1, best).isfinite().squeeze(-1)


def _candidate_floor(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """A logit per row below which nothing can be kept, and the row's log-sum-exp: both float32 [N].

    top-k: the k-th largest of the maxima of disjoint stripes is at most the k-th largest entry. top-p: the entries of
    probability under (1 - p) / V weigh less than 1 - p together, so the mass above each of them is at least p.
    """
    vocabulary = logits.shape[-1]
    probability = logits.softmax(dim=-1)
    normaliser = logits.amax(dim=-1) - probability.amax(dim=-1).log()
    # Half of the share, so that rounding cannot lose an entry at the edge; never what is left out already.
    floor = normaliser + ((1.0 - top_p) / (2 * vocabulary)).log()
    limited = top_k > 0
    if bool(limited.any()):
        count = vocabulary // _NARROW
        widest = int(top_k.max())
        bound = torch.full_like(floor, float("-inf"))
        if widest <= count:
            whole = logits[:, : count * _NARROW].reshape(-1, count, _NARROW)
            maxima = whole.amax(dim=-1).topk(widest, dim=-1).values
            bound = maxima.gather(-1, (top_k.clamp(min=1) - 1).unsqueeze(-1)).squeeze(-1)
        # Top-p of a row with both is of the renormalised rest: its own floor does not hold.
        floor = torch.where(limited, bound, floor)
    return floor.clamp_(min=torch.finfo(torch.float32).min), normaliser


def _edges(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's kept set ends.

    Args:
        logits: float32 [N, V], rows finite at their largest; top_k: int64 [N] (0 = off, below V); top_p: float32 [N].

    Returns:
        smallest kept logit [N]; int64 [N] how many entries with exactly that logit are kept; bool [N] whether the row
        has more of them.
    """
    rows = logits.shape[0]
    floor, normaliser = _candidate_floor(logits, top_k, top_p)
    row, column = (logits >= floor.unsqueeze(-1)).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(row.shape[0], device=row.device) - (counts.cumsum(0) - counts)[row]
    values = logits.new_full((rows, int(counts.max())), float("-inf"))
    values[row, place] = logits[row, column]
    values = values.sort(dim=-1, descending=True).values.to(torch.float64)
    limited = (top_k > 0).unsqueeze(-1)
    last = values.gather(-1, (top_k.clamp(min=1, max=values.shape[-1]) - 1).unsqueeze(-1))
    allowed = values > float("-inf")
    allowed &= ~limited | (values >= last)
    inside = values.masked_fill(~allowed, float("-inf"))
    total = torch.where(limited, inside.logsumexp(dim=-1, keepdim=True), normaliser.to(torch.float64).unsqueeze(-1))
    probability = (inside - total).exp()
    above = probability.cumsum(dim=-1) - probability
    wanted = top_p.to(torch.float64).unsqueeze(-1)
    kept = (allowed & ((above < wanted) | (wanted >= 1))).sum(dim=-1, keepdim=True).clamp_(min=1)
    edge = values.gather(-1, kept - 1)
    ties = kept - (values > edge).sum(dim=-1, keepdim=True)
    crowded = (values == edge).sum(dim=-1, keepdim=True) > ties
    return edge.squeeze(-1).to(torch.float32), ties.squeeze(-1), crowded.squeeze(-1)


def _truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`logits` float32 [N, V] with -inf outside top-k and top-p; rows that ask for neither pass as they are."""
    top_k = torch.where(top_k < logits.shape[-1], top_k, torch.zeros_like(top_k))
    # A row that is not finite has no kept set; it passes as it is, and whoever verifies it flags it.
    rows = (((top_k > 0) | (top_p < 1)) & logits.amax(dim=-1).isfinite()).nonzero().squeeze(-1)
    if rows.numel() == 0:
        return logits
    every = rows.numel() == logits.shape[0]
    chosen = logits if every else logits[rows]
    edge, ties, crowded = _edges(chosen, top_k[rows], top_p[rows])
    out = torch.where(chosen < edge.unsqueeze(-1), float("-inf"), chosen)
    for number in crowded.nonzero().squeeze(-1).tolist():
        tied = (chosen[number] == edge[number]).nonzero().squeeze(-1)
        out[number, tied[int(ties[number]) :]] = float("-inf")
    return out if every else logits.index_copy(0, rows, out)


def _above_floor(logits: Tensor, min_p: Tensor) -> Tensor:
    """`logits` float32 [N, V] with -inf where a probability is below `min_p` [N] of its row's largest."""
    # Rows that are not finite need no care: one with NaN or +inf still holds it afterwards, and one of nothing but -inf
    # is left as it is, so that `verify` flags all of them.
    rows = (min_p > 0).nonzero().squeeze(-1)
    every = rows.numel() == logits.shape[0]
    chosen = logits if every else logits[rows]
    floor = chosen.amax(dim=-1, keepdim=True) + min_p[rows].log().unsqueeze(-1)
    out = chosen.masked_fill(chosen < floor, float("-inf"))
    return out if every else logits.index_copy(0, rows, out)


def transform(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None) -> Tensor:
    """Logits of the distribution that a request samples from: temperature, then min-p, then top-k, then top-p, each on
    what is left.

    Sets are those of transformers' warpers (min-p keeps every token of at least that share of the likeliest one's
    probability; top-k every token tied with the k-th; top-p a token while the mass ranked above it is below top_p, at
    least one). The order is not: transformers' `generate` puts min-p last, so that its top-p also counts the mass of
    what min-p leaves out here, and may keep more where both are asked for. Among tokens tied at the edge of the nucleus
    the lowest ids stay. A greedy row (temperature 0) becomes one-hot at its largest logit, lowest id on ties.

    Args:
        logits: [N, V], any floating dtype; -inf is legal. Not modified.
        temperature: float32 [N], top_k: int64 [N], top_p: float32 [N], min_p: float32 [N], as in `Sampling`; without
            min_p no row asks for it.

    Returns:
        float32 [N, V], -inf outside the kept set. It may be `logits` itself when no row asks for anything.

    Raises:
        ValueError: shapes disagree.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, V]")
    min_p = torch.zeros_like(temperature) if min_p is None else min_p
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        if value.shape != logits.shape[:1]:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [N] = [{logits.shape[0]}]")
    greedy = temperature == 0
    out = logits.to(torch.float32)
    if bool(((temperature != 1) & ~greedy).any()):
        out = out / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(-1)
    if bool(((min_p > 0) & ~greedy).any()):
        out = _above_floor(out, min_p.masked_fill(greedy, 0.0))
    if bool((((top_k > 0) | (top_p < 1)) & ~greedy).any()):
        out = _truncate(out, top_k.masked_fill(greedy, 0), top_p.masked_fill(greedy, 1.0))
    if bool(greedy.any()):
        rows = greedy.nonzero().squeeze(-1)
        best, _ = largest(logits[rows])
        one_hot = torch.full((rows.shape[0], out.shape[1]), float("-inf"), device=out.device)
        one_hot[torch.arange(rows.shape[0], device=out.device), best] = 0.0
        # A greedy row that is not finite keeps what it holds, so that `verify` still finds it not finite.
        usable = out[rows].amax(dim=-1).isfinite().unsqueeze(-1)
        out = out.index_copy(0, rows, torch.where(usable, one_hot, out[rows]))
    return out
