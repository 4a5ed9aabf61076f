"""Sampling: what a request asks for, and the token that its noise picks.

`truncation.transform` turns logits into the logits of the distribution to draw from; `draw` draws from it with noise
keyed by (request seed, absolute position, target token id). Shape letters: N rows, B requests, V vocabulary (target or
draft).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from .noise import bits_from_keys, gumbel_from_bits, keys
from .transfer import at_once
from .truncation import largest

BLOCK = 4096
"""Target token ids per block of the hierarchical draw (part of the noise's definition: changing it changes texts)."""

STREAMS: dict[str, tuple[int, int]] = {"target": (0, 1), "draft": (2, 3), "residual": (4, 5), "bonus": (6, 7)}
"""Noise streams (block choice, token choice) of each purpose that a token is drawn for."""

COLDEST = 1e-5
"""Below it logits / temperature leaves what float32 tells apart: such a temperature is greedy decoding."""

Row = tuple[float, int, float, int] | tuple[float, int, float, int, float]
"""What one request asks for: temperature, top_k, top_p, seed and, where it is on, min_p."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of B requests, one entry each.

    Attributes:
        temperature: float32 [B]; 0 means greedy, and what narrows the choice is then ignored. `of` takes what is below
            COLDEST for 0.
        top_k: int64 [B]; 0 means off.
        top_p: float32 [B] in [0, 1]; 1 means off.
        seed: int64 [B].
        min_p: float32 [B] in [0, 1]: least probability as a share of the likeliest token's; 0 means off.
        decided: `greedy` and `truncated`, where they are known; else they are worked out, which waits for the device.
        greedy: every request is greedy.
        truncated: some sampled request asks for top-k, top-p or min-p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    min_p: Tensor
    decided: InitVar[tuple[bool, bool] | None] = None
    greedy: bool = field(default=False, init=False)
    truncated: bool = field(default=False, init=False)

    def __post_init__(self, decided: tuple[bool, bool] | None) -> None:
        dtypes = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
        for name, dtype in (dtypes | {"seed": torch.int64}).items():
            value = getattr(self, name)
            if value.shape != self.seed.shape or value.dim() != 1:
                raise ValueError(f"sampling.{name} has shape {list(value.shape)}; all five must be [B]")
            if value.dtype != dtype:
                raise ValueError(f"sampling.{name} is {value.dtype}; it must be {str(dtype).removeprefix('torch.')}")
        if decided is None:
            sampled = self.temperature > 0
            narrowed = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
            decided = bool((self.temperature == 0).all()), bool((narrowed & sampled).any())
        object.__setattr__(self, "greedy", decided[0])
        object.__setattr__(self, "truncated", decided[1])

    @classmethod
    def of(cls, rows: Iterable[Row], device: torch.device | str = "cpu") -> Sampling:
        """Sampling of rows (temperature, top_k, top_p, seed) or (temperature, top_k, top_p, seed, min_p), in order.

        Raises:
            ValueError: a value outside its range; the message names the row.
        """
        entries = [(*row, 0.0) if len(row) == 4 else row for row in rows]
        for number, (temperature, top_k, top_p, _, min_p) in enumerate(entries):
            if not 0 <= temperature < float("inf"):
                raise ValueError(f"row {number}: temperature {temperature} must be finite and at least 0 (0 = greedy)")
            if top_k < 0:
                raise ValueError(f"row {number}: top_k {top_k} must be at least 0 (0 = off)")
            if not 0 <= top_p <= 1:
                raise ValueError(f"row {number}: top_p {top_p} must be within [0, 1] (1 = off)")
            if not 0 <= min_p <= 1:
                raise ValueError(f"row {number}: min_p {min_p} must be within [0, 1] (0 = off)")
        sampled = [row for row in entries if row[0] >= COLDEST]
        narrowed = any(row[1] > 0 or row[2] < 1 or row[4] > 0 for row in sampled)
        # Seeds are 64 bits: an unsigned one keeps its bit pattern.
        seeds = [((row[3] + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) for row in entries]
        floats = [[row[0] if row[0] >= COLDEST else 0.0, row[2], row[4]] for row in entries]
        whole = [[row[1], seed] for row, seed in zip(entries, seeds, strict=True)]
        parts = (
            *torch.tensor(floats, dtype=torch.float32).view(-1, 3).unbind(1),
            *torch.tensor(whole, dtype=torch.int64).view(-1, 2).unbind(1),
        )
        there = at_once(parts, device)
        return cls(there[0], there[3], there[1], there[4], there[2], decided=(not sampled, narrowed))

    def __len__(self) -> int:
        return self.seed.shape[0]

    def select(self, index: Tensor) -> Sampling:
        """Sampling of the requests (or, with repeats, of the rows) that `index` int64 [N] names."""
        return Sampling(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.seed[index],
            self.min_p[index],
            decided=(True, False) if self.greedy else None,
        )


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
