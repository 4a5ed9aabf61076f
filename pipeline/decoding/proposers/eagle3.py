"""Decoding with Eagle3: real pairs of the text in a cache, speculated ones behind them for the length of a block.

Letters: B requests, T tokens, H query heads, Hkv KV heads, d head dim, L taps, D hidden.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from pipeline.decoding.cache import KVCache
from pipeline.decoding.prepack import PackedLinear, available, prepack
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.proposers.drawing import Drawing
from pipeline.decoding.request import Sequence
from pipeline.drafts.eagle3 import Eagle3Draft


class Eagle3Proposer:
    """Proposes blocks with an Eagle3Draft.

    After verification the speculated pairs are overwritten by real ones, made from the target's taps of what was
    accepted.

    Args:
        draft: not modified; the proposer works on a copy whose linears may be prepacked.
        slots, capacity: the engine's max_requests and max_context.
        rule: verification rule, which decides the noise that tokens are drawn with.
        pack: prepack linears (CPU, fp32).
    """

    name = "eagle3"

    def __init__(
        self, draft: Eagle3Draft, *, slots: int, capacity: int, rule: str = "coupled", pack: bool = True
    ) -> None:
        shared = {id(draft.embed): draft.embed, id(draft.lm_rows): draft.lm_rows}
        self.draft = copy.deepcopy(draft, shared).eval().requires_grad_(False)
        c = self.config = draft.config
        self.block_size = c.tokens_per_block
        self.layer_ids = list(c.target_layer_ids)
        self.rule = rule
        self.device = draft.embed.device
        dtype = draft.lm_rows.dtype
        self.cache = KVCache(1, slots, c.num_kv_heads, capacity + c.block_size, c.head_dim, dtype, self.device)
        self._last = torch.zeros(slots, c.hidden_size, dtype=dtype, device=self.device)
        self._lm_head = None
        if pack and self.device.type == "cpu" and dtype == torch.float32 and available():
            prepack(self.draft)
            self._lm_head = PackedLinear(draft.lm_rows)
        self._length: dict[int, int] = {}

    def admit(self, sequence: Sequence) -> None:
        self._length[sequence.slot] = 0

    def release(self, sequence: Sequence) -> None:
        self._length.pop(sequence.slot, None)

    @torch.inference_mode()
    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        """Extends the context by pairs (tap at a position, token after it); the newest position's g is kept."""
        if not commits:
            return
        if taps is None:
            raise RuntimeError("the Eagle3 proposer needs taps; the engine captured none")
        rows: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        following: list[int] = []
        newest: list[tuple[int, int]] = []
        for c in commits:
            slot, text = c.sequence.slot, c.sequence.tokens
            if self._length[slot] != c.start:
                raise RuntimeError(f"draft context of slot {slot} ends at {self._length[slot]}, commit is at {c.start}")
            # A request that stopped inside its block has no token after what lies behind the stop, nor needs it.
            count = min(c.rows.stop - c.rows.start, len(text) - 1 - c.start)
            if count < 1:
                continue
            self._length[slot] += count
            rows += range(c.rows.start, c.rows.start + count)
            positions += range(c.start, c.start + count)
            slots += [slot] * count
            following += text[c.start + 1 : c.start + 1 + count]
            newest.append((slot, len(rows) - 1))
        if not rows:
            return
        at = torch.tensor(positions, device=self.device)
        g = self.draft.context(taps[torch.tensor(rows, device=taps.device)].to(self._last.dtype))
        k, v = self.draft.context_kv(g, torch.tensor(following, device=self.device), at)
        self.cache.write(0, torch.tensor(slots, device=self.device), at, k, v)
        where, which = (torch.tensor(x, device=self.device) for x in zip(*newest, strict=True))
        self._last[where] = g[which]

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> Proposal:
        drawing = Drawing(self.draft, sequences, self.rule)
        slots = torch.tensor([s.slot for s in sequences], device=self.device)
        positions = drawing.anchors - 1
        g = self._last[slots]
        for k in range(self.block_size):
            at = positions + k
            g, hidden = self.draft.advance(g, drawing.previous, at, self._attend(slots, at))
            base = self.draft.cap(self._lm_head(hidden)) if self._lm_head is not None else self.draft.logits(hidden)
            drawing.draw(base)
        return drawing.proposal(None)

    def _attend(self, slots: torch.Tensor, at: torch.Tensor):  # type: ignore[no-untyped-def]
        end = int(at.max()) + 1
        seen = torch.arange(end, device=self.device) <= at[:, None]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.cache.write(0, slots, at, k, v)
            groups = q.shape[1] // k.shape[1]
            keys, values = (x[0, slots, :, :end] for x in (self.cache.k, self.cache.v))
            grid = q.unflatten(1, (-1, groups))
            return F.scaled_dot_product_attention(grid, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)

        return attend
