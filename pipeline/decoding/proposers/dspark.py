"""Decoding with a block drafter (DSpark, DFlash): context keys grow with accepted taps, one batch of blocks.

Letters: B requests, K block size, T tokens per block, G query heads per KV head, n context positions, d head dim, Vd
draft vocabulary.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from pipeline.decoding.cache import KVCache
from pipeline.decoding.prepack import PackedLinear, available, prepack
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.proposers.drawing import Drawing, into_dtype
from pipeline.decoding.request import Sequence
from pipeline.drafts.dspark import DSparkDraft


class DSparkProposer:
    """Proposes blocks with a DSparkDraft.

    Args:
        draft: not modified; the proposer works on a copy whose linears may be prepacked.
        slots, capacity: the engine's max_requests and max_context.
        rule: verification rule, which decides the noise that tokens are drawn with.
        pack: prepack linears (CPU, fp32).
    """

    name = "dspark"

    def __init__(
        self, draft: DSparkDraft, *, slots: int, capacity: int, rule: str = "coupled", pack: bool = True
    ) -> None:
        shared = {id(draft.embed): draft.embed, id(draft.lm_rows): draft.lm_rows}
        self.draft = copy.deepcopy(draft, shared).eval().requires_grad_(False)
        into_dtype(self.draft, draft.lm_rows.dtype)
        c = self.config = draft.config
        self.block_size = c.tokens_per_block
        self.layer_ids = list(c.target_layer_ids)
        self.rule = rule
        self.device = draft.embed.device
        # Slots of a block are written behind the context and overwritten by the next commit.
        self.cache = KVCache(
            c.num_layers,
            slots,
            c.num_kv_heads,
            capacity + c.block_size,
            c.head_dim,
            draft.lm_rows.dtype,
            self.device,
        )
        self._lm_head = None
        if pack and self.device.type == "cpu" and draft.lm_rows.dtype == torch.float32 and available():
            prepack(self.draft)
            self._lm_head = PackedLinear(draft.lm_rows)
        # On CPU the head's prepacked matrix is faster than the reference's plain one.
        self._fused = self.device.type == "cuda" and self.draft.confidence_head is not None
        self._length: dict[int, int] = {}

    def admit(self, sequence: Sequence) -> None:
        self._length[sequence.slot] = 0

    def release(self, sequence: Sequence) -> None:
        self._length.pop(sequence.slot, None)
        self.cache.clear(sequence.slot)

    @torch.inference_mode()
    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        if not commits:
            return
        if taps is None:
            raise RuntimeError("the DSpark proposer needs taps; the engine captured none")
        rows: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for c in commits:
            count = c.rows.stop - c.rows.start
            slot = c.sequence.slot
            if self._length[slot] != c.start:
                raise RuntimeError(f"draft context of slot {slot} ends at {self._length[slot]}, commit is at {c.start}")
            self._length[slot] += count
            rows += range(c.rows.start, c.rows.stop)
            positions += range(c.start, c.start + count)
            slots += [slot] * count
        # As many rows need not be the same order: prompt chunks come last in a step and first among its commits.
        whole = rows == list(range(taps.shape[0]))
        chosen = taps if whole else taps[torch.tensor(rows, device=taps.device)]
        at = torch.tensor(positions, device=self.device)
        where = torch.tensor(slots, device=self.device)
        context = self.draft.context(chosen.to(self.draft.lm_rows.dtype))
        for i, (k, v) in enumerate(self.draft.context_kv(context, at)):
            self.cache.write(i, where, at, k, v)

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> Proposal:
        batch, block = len(sequences), self.block_size
        drawing = Drawing(self.draft, sequences, self.rule)
        if self._fused:
            return self._in_one(drawing, sequences)
        hidden = self.draft.blocks(drawing.previous, drawing.anchors, self._attend(sequences))
        base = self.draft.cap(self._lm_head(hidden)) if self._lm_head is not None else self.draft.logits(hidden)
        base = base.view(batch, block, -1)
        hidden = hidden.view(batch, block, -1)
        state = None
        for k in range(block):
            bias, state = self.draft.markov_step(hidden[:, k], drawing.previous, state)
            drawing.draw(base[:, k] + bias)
        return drawing.proposal(self.draft.confidence(hidden, torch.stack(drawing.seen, 1)))

    def _in_one(self, drawing: Drawing, sequences: list[Sequence]) -> Proposal:
        """The same block by the kernel that draws all its slots."""
        draft = self.draft
        hidden = draft.blocks(drawing.previous, drawing.anchors, self._attend(sequences))
        hidden = hidden.view(len(sequences), self.block_size, -1)
        head, state = draft.markov_head, None

        def code(k: int, previous: torch.Tensor) -> torch.Tensor:
            nonlocal state
            assert head is not None
            made, state = head.step(hidden[:, k], previous, state)
            return made

        return drawing.in_one(
            draft.logits(hidden),
            code if head is not None else None,
            head.markov_w2.weight if head is not None else None,
            lambda seen: draft.confidence(hidden, seen),
        )

    def _attend(self, sequences: list[Sequence]):  # type: ignore[no-untyped-def]
        c = self.config
        groups, block = c.num_heads // c.num_kv_heads, c.block_size
        slots = [s.slot for s in sequences]
        lengths = [self._length[s] for s in slots]
        low, high, end = min(slots), max(slots) + 1, max(lengths) + block
        index = torch.tensor(slots, device=self.device).repeat_interleave(block)
        offsets = torch.tensor([n + j for n in lengths for j in range(block)], device=self.device)
        row = torch.tensor([s - low for s in slots], device=self.device)
        masks = {w: self._visible(row, lengths, low, high, end, w) for w in {c.window(i) for i in range(c.num_layers)}}

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.cache.write(layer, index, offsets, k, v)
            grid = q.view(len(slots), block, c.num_kv_heads, groups, c.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
            if high - low != len(slots) or slots != sorted(slots):
                full = q.new_zeros(high - low, *grid.shape[1:])
                full[row] = grid
                grid = full
            out = F.scaled_dot_product_attention(
                grid,
                self.cache.k[layer, low:high, :, :end],
                self.cache.v[layer, low:high, :, :end],
                attn_mask=masks[c.window(layer)],
            )
            if out.shape[0] != len(slots) or slots != sorted(slots):
                out = out[row]
            out = out.unflatten(2, (groups, block)).permute(0, 3, 1, 2, 4)
            return out.reshape(-1, c.num_heads, c.head_dim)

        return attend

    def _visible(
        self, row: torch.Tensor, lengths: list[int], low: int, high: int, end: int, window: int
    ) -> torch.Tensor | None:
        """bool[slots low..high, 1, G*K, end] of what each slot may see; None if that is all of it."""
        c = self.config
        if len(lengths) == 1 and (not window or end <= window):
            return None
        length = torch.tensor(lengths, device=self.device)[:, None, None]
        at = torch.arange(end, device=self.device)
        mine = at < length + c.block_size
        if window:
            own = length + torch.arange(c.block_size, device=self.device)[:, None]
            mine = mine & ((at >= length) | (at > own - window))
        visible = torch.zeros(high - low, c.block_size, end, dtype=torch.bool, device=self.device)
        visible[..., 0] = True  # rows of no request: a softmax over nothing would be NaN
        visible[row] = mine.expand(-1, c.block_size, -1)
        return visible.repeat(1, c.num_heads // c.num_kv_heads, 1)[:, None]
