"""Sampling: what a request asks for, the logits that result, and the token that its noise picks.

`transform` turns logits into the logits of the distribution to draw from; `draw` draws from it with noise keyed by
(request seed, absolute position, target token id). Shape letters: N rows, B requests, V vocabulary (target or draft).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .noise import bits_from_keys, gumbel_from_bits, keys

BLOCK = 4096
"""Target token ids per block of the hierarchical draw (part of the noise's definition: changing it changes texts)."""

STREAMS: dict[str, tuple[int, int]] = {"target": (0, 1), "draft": (2, 3), "residual": (4, 5), "bonus": (6, 7)}
"""Noise streams (block choice, token choice) of each purpose that a token is drawn for."""

COLDEST = 1e-5
"""Below it logits / temperature leaves what float32 tells apart: such a temperature is greedy decoding."""

_STRIPE = 256
_NARROW = 64


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of B requests, one entry each.

    Attributes:
        temperature: float32 [B]; 0 means greedy, and the other two are then ignored. `of` takes what is below
            COLDEST for 0.
        top_k: int64 [B]; 0 means off.
        top_p: float32 [B] in [0, 1]; 1 means off.
        seed: int64 [B].
        greedy: every request is greedy (computed once, so that the fast path costs nothing per step).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    greedy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name, kind in (("temperature", "float"), ("top_k", "int"), ("top_p", "float"), ("seed", "int")):
            value = getattr(self, name)
            if value.shape != self.seed.shape or value.dim() != 1:
                raise ValueError(f"sampling.{name} has shape {list(value.shape)}; all four must be [B]")
            if value.dtype != (torch.float32 if kind == "float" else torch.int64):
                raise ValueError(f"sampling.{name} is {value.dtype}; it must be {kind}{32 if kind == 'float' else 64}")
        object.__setattr__(self, "greedy", bool((self.temperature == 0).all()))

    @classmethod
    def of(cls, rows: Iterable[tuple[float, int, float, int]], device: torch.device | str = "cpu") -> Sampling:
        """Sampling of `(temperature, top_k, top_p, seed)` rows, in order.

        Raises:
            ValueError: a value outside its range; the message names the row.
        """
        entries = list(rows)
        for number, (temperature, top_k, top_p, _) in enumerate(entries):
            if not 0 <= temperature < float("inf"):
                raise ValueError(f"row {number}: temperature {temperature} must be finite and at least 0 (0 = greedy)")
            if top_k < 0:
                raise ValueError(f"row {number}: top_k {top_k} must be at least 0 (0 = off)")
            if not 0 <= top_p <= 1:
                raise ValueError(f"row {number}: top_p {top_p} must be within [0, 1] (1 = off)")
        # Seeds are 64 bits: an unsigned one keeps its bit pattern.
        seeds = [((row[3] + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) for row in entries]
        return cls(
            temperature=torch.tensor(
                [row[0] if row[0] >= COLDEST else 0.0 for row in entries], dtype=torch.float32, device=device
            ),
            top_k=torch.tensor([row[1] for row in entries], dtype=torch.int64, device=device),
            top_p=torch.tensor([row[2] for row in entries], dtype=torch.float32, device=device),
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
        )

    @cached_property
    def truncated(self) -> bool:
        """Some sampled request asks for top-k or top-p. Waits for the device, once."""
        return bool((((self.top_k > 0) | (self.top_p < 1)) & (self.temperature > 0)).any())

    def __len__(self) -> int:
        return self.seed.shape[0]

    def select(self, index: Tensor) -> Sampling:
        """Sampling of the requests (or, with repeats, of the rows) that `index` int64 [N] names."""
        return Sampling(self.temperature[index], self.top_k[index], self.top_p[index], self.seed[index])


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
    # Half of the share, so that rounding cannot lose an entry at the edge.
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
    return floor, normaliser


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


def transform(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits of the distribution that a request samples from: temperature, then top-k, then top-p on what is left.

    Order and sets are those of transformers' warpers (top-k keeps every token tied with the k-th; top-p keeps a token
    while the mass ranked above it is below top_p, at least one). Among tokens tied at the edge of the nucleus the
    lowest ids stay. A greedy row (temperature 0) becomes one-hot at its largest logit, lowest id on ties.

    Args:
        logits: [N, V], any floating dtype; -inf is legal. Not modified.
        temperature: float32 [N], top_k: int64 [N], top_p: float32 [N], as in `Sampling`.

    Returns:
        float32 [N, V], -inf outside the kept set. It may be `logits` itself when no row asks for anything.

    Raises:
        ValueError: shapes disagree.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, V]")
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if value.shape != logits.shape[:1]:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [N] = [{logits.shape[0]}]")
    greedy = temperature == 0
    out = logits.to(torch.float32)
    if bool(((temperature != 1) & ~greedy).any()):
        out = out / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(-1)
    if bool((((top_k > 0) | (top_p < 1)) & ~greedy).any()):
        out = _truncate(out, top_k.masked_fill(greedy, 0), top_p.masked_fill(greedy, 1.0))
    if bool(greedy.any()):
        rows = greedy.nonzero().squeeze(-1)
        best, _ = largest(logits[rows])
        one_hot = torch.full((rows.shape[0], out.shape[1]), float("-inf"), device=out.device)
        one_hot[torch.arange(rows.shape[0], device=out.device), best] = 0.0
        # A greedy row that is not finite keeps what it holds, so that it can still be told.
        usable = out[rows].amax(dim=-1).isfinite().unsqueeze(-1)
        out = out.index_copy(0, rows, torch.where(usable, one_hot, out[rows]))
    return out


def _block_sums(mass: Tensor, bounds: list[int] | None) -> Tensor:
    """Sums of `mass` [N, V] over blocks: [N, blocks]; `bounds` are block edges along V, None for plain strides."""
    rows, width = mass.shape
    if bounds is not None:
        return torch.stack([mass[:, low:high].sum(dim=-1) for low, high in zip(bounds, bounds[1:], strict=False)], -1)
    whole = width // BLOCK
    parts = []
    if whole:
        parts.append(mass[:, : whole * BLOCK].reshape(rows, whole, BLOCK).sum(dim=-1))
    if width % BLOCK:
        parts.append(mass[:, whole * BLOCK :].sum(dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def draw_mass(mass: Tensor, seed: Tensor, position: Tensor, streams: Tensor, token_ids: Tensor | None = None) -> Tensor:
    """`draw` from masses instead of logits, all rows sampled, with the noise streams given per row.

    Args:
        mass: float32 [N, V], at least 0, any scale; seed, position: int64 [N]; token_ids: int64 [V] ascending or None.
        streams: int64 [2, N]: stream of the block choice and of the token choice.

    Returns:
        int64 [N] target token ids.
    """
    rows, width = mass.shape
    device = mass.device
    bounds: list[int] | None = None
    if token_ids is None:
        blocks = (width + BLOCK - 1) // BLOCK
    else:
        blocks = int(token_ids[-1]) // BLOCK + 1
        bounds = torch.searchsorted(token_ids, torch.arange(blocks + 1, device=device) * BLOCK).tolist()
    key = keys(seed, position, streams)  # [2 keys, 2 choices, N]
    if blocks == 1:
        block = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        noise = bits_from_keys(key[:, 0].unsqueeze(-1), torch.arange(blocks, dtype=torch.int32, device=device))
        block = (_block_sums(mass, bounds).log_() + gumbel_from_bits(noise)).argmax(dim=-1)
    if bounds is None:
        low = block * BLOCK
        high = (low + BLOCK).clamp_(max=width)
        span = min(BLOCK, width)
    else:
        edge = torch.tensor(bounds, device=device)
        low, high = edge[block], edge[block + 1]
        span = max(second - first for first, second in zip(bounds, bounds[1:], strict=False))
    column = low.unsqueeze(-1) + torch.arange(span, device=device)
    beyond = column >= high.unsqueeze(-1)
    column.clamp_(max=width - 1)
    token = column if token_ids is None else token_ids[column]
    score = mass.gather(-1, column).log_()
    score += gumbel_from_bits(bits_from_keys(key[:, 1].unsqueeze(-1), token))
    score.masked_fill_(beyond, float("-inf"))
    return token.gather(-1, score.argmax(dim=-1, keepdim=True)).squeeze(-1)


def stream_pairs(name: str, rows: int, device: torch.device) -> Tensor:
    """The stream pair `name` for `rows` rows: int64 [2, rows], as `draw_mass` takes it."""
    return torch.tensor(STREAMS[name], device=device).unsqueeze(-1).expand(2, rows)


def draw(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    token_ids: Tensor | None = None,
    *,
    temperature: Tensor | None = None,
    stream: str = "target",
    anchor: Tensor | None = None,
) -> Tensor:
    """One token per row from softmax(logits), by noise keyed by (seed, position, target token id, stream).

    Hierarchical Gumbel draw: a block of 4096 target ids by Gumbel noise over the blocks' log-sum-exps, then a token
    inside it by Gumbel noise on its entries: exactly softmax, with noise on one block only. Block and token are those
    of the *target* vocabulary, so a draft's draw over its own vocabulary meets the same noise as the target's draw at
    that position: that is the coupling.

    Args:
        logits: [N, V] of the distribution to draw from (after `transform`); -inf is legal.
        seed: int64 [N]. position: int64 [N], absolute position of the token that is drawn, in [0, 2^31).
        token_ids: int64 [V], ascending target ids of the columns (a draft's d2t); None when column = target id.
        temperature: float32 [N]; rows with 0 take the argmax, lowest id on ties, without noise. None: no such rows
            (rows that `transform` made one-hot need no mention).
        stream: which noise: "target" for the target's draws and for a draft's under the coupled rule; "draft" for a
            draft's under the ratio rule, where sharing noise with the verification is biased (`proposal_stream`).
        anchor: int64 [N], absolute position of the round's anchor: keys the noise by the round as well, so that a
            position proposed again in a later round meets fresh noise. Only for streams where nothing is coupled.

    Returns:
        int64 [N] target token ids. A row that is not finite yields some valid id: flag such rows (`verify` does).

    Raises:
        ValueError: shapes disagree, or the stream is unknown, or the coupled stream is keyed by the anchor.
    """
    if logits.dim() != 2 or 0 in logits.shape[1:]:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, V] with V > 0")
    rows, width = logits.shape
    for name, value in (("seed", seed), ("position", position), ("temperature", temperature), ("anchor", anchor)):
        if value is not None and value.shape != (rows,):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [N] = [{rows}]")
    if token_ids is not None and token_ids.shape != (width,):
        raise ValueError(f"token_ids have shape {list(token_ids.shape)}; expected [V] = [{width}]")
    if stream not in STREAMS:
        raise ValueError(f"stream {stream!r} is not one of {', '.join(STREAMS)}")
    if anchor is not None:
        if stream == "target":
            raise ValueError("the target stream is keyed by position alone: leave anchor out, or use stream='draft'")
        position = position | ((anchor + 1) << 32)
    if rows == 0:
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    greedy = None if temperature is None else temperature == 0
    if greedy is not None and bool(greedy.any()):
        best, _ = largest(logits)
        out = best if token_ids is None else token_ids[best]
        sampled = (~greedy).nonzero().squeeze(-1)
        if sampled.numel():
            own = stream_pairs(stream, sampled.shape[0], logits.device)
            mass = logits[sampled].softmax(dim=-1, dtype=torch.float32)
            out[sampled] = draw_mass(mass, seed[sampled], position[sampled], own, token_ids)
        return out
    mass = logits.softmax(dim=-1, dtype=torch.float32)
    return draw_mass(mass, seed, position, stream_pairs(stream, rows, logits.device), token_ids)


def proposal_stream(rule: str) -> str:
    """The stream that a draft draws its proposal with under a verification rule ("coupled" or "ratio").

    Raises:
        ValueError: the rule is unknown.
    """
    streams = {"coupled": "target", "ratio": "draft"}
    if rule not in streams:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(streams)}")
    return streams[rule]
