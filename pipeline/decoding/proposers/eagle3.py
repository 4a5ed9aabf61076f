"""Decoding with Eagle3: real pairs of the text in a cache, speculated ones behind them for the length of a block.

Letters: B requests, T tokens, L taps, D hidden.
"""

from __future__ import annotations

import copy

import torch

from pipeline.decoding.attention import StepLayout
from pipeline.decoding.cache import on_device
from pipeline.decoding.geometry import LayerAttention
from pipeline.decoding.prepack import PackedLinear, available, prepack
from pipeline.decoding.proposers.base import Commit, Proposal
from pipeline.decoding.proposers.context import DraftContext, WithContext
from pipeline.decoding.proposers.drawing import Asked, Drawing, Drawn, into_dtype
from pipeline.decoding.request import Sequence
from pipeline.decoding.table_layout import Segment, TableLayout
from pipeline.drafts.eagle3 import AttendOne, Eagle3Draft


class Eagle3Proposer(WithContext):
    """Proposes blocks with an Eagle3Draft.

    After verification the speculated pairs are overwritten by real ones, made from the target's taps of what was
    accepted.

    Args:
        draft: not modified; the proposer works on a copy whose linears may be prepacked.
        rule: verification rule, which decides the noise that tokens are drawn with.
        pack: prepack linears (CPU, fp32).
    """

    name = "eagle3"

    def __init__(self, draft: Eagle3Draft, *, rule: str = "coupled", pack: bool = True) -> None:
        super().__init__()
        self.draft: Eagle3Draft = copy.deepcopy(draft, draft.borrowed()).eval().requires_grad_(False)
        into_dtype(self.draft, draft.dtype)
        c = self.config = draft.config
        self.block_size = c.tokens_per_block
        self.layer_ids = list(c.target_layer_ids)
        self.rule = rule
        self.device = draft.embed.device
        self._dtype = draft.dtype
        layer = LayerAttention(c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim, c.head_dim**-0.5, 0, 0.0, 0)
        # A page's last pair holds the token after the page, which the page's own tokens don't tell.
        self.context = DraftContext([layer], self._dtype, self.device, lambda s, end: s.tokens[end])
        self._last: dict[Sequence, torch.Tensor] = {}
        self._lm_head = None
        if pack and self.device.type == "cpu" and self._dtype == torch.float32 and available():
            prepack(self.draft)
            self._lm_head = PackedLinear(self.draft.lm_rows)

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        self._last.pop(sequence, None)

    @torch.inference_mode()
    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        """Extends the context by pairs (tap at a position, token after it); the newest position's g is kept."""
        if not commits:
            return
        if taps is None:
            raise RuntimeError("the Eagle3 proposer needs taps; the engine captured none")

        def count(c: Commit) -> int:
            # A request that stopped inside its block has no token after what lies behind the stop, nor needs it.
            return min(c.rows.stop - c.rows.start, len(c.sequence.tokens) - 1 - c.start)

        following: list[int] = []
        newest: dict[Sequence, int] = {}
        for c in commits:
            if count(c) > 0:
                following += c.sequence.tokens[c.start + 1 : c.start + 1 + count(c)]
                newest[c.sequence] = len(following) - 1
        more = self.context.extend(commits, count)
        if more is None:
            return
        g = self.draft.context(taps[on_device(more.rows, taps.device)].to(self._dtype))
        k, v = self.draft.context_kv(g, on_device(following, self.device), more.positions)
        self.context.cache.write(0, more.cells, k.transpose(0, 1), v.transpose(0, 1))
        self._last |= {s: g[row].clone() for s, row in newest.items()}

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> Proposal:
        segments = [Segment(s.pages, len(s.tokens) - 2, 1) for s in sequences]
        state = torch.stack([self._last[s] for s in sequences])
        return self._proposal(Asked.of(sequences, state), segments, causal=True)

    def _draw(self, asked: Asked, layout: StepLayout | TableLayout) -> Drawn:
        assert asked.state is not None
        drawing, g = Drawing(self.draft, asked, self.rule), asked.state
        for k in range(self.block_size):
            layout = layout.behind() if k else layout
            g, hidden = self.draft.advance(g, drawing.previous, layout.positions, _attend(layout))
            base = self.draft.cap(self._lm_head(hidden)) if self._lm_head is not None else self.draft.logits(hidden)
            drawing.draw(base)
        return drawing.drawn(None)


def _attend(layout: StepLayout | TableLayout) -> AttendOne:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layout.attend(0, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))

    return attend
