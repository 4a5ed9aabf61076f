"""Decoding with a block drafter (DSpark, DFlash): context keys grow with accepted taps, one batch of blocks.

Letters: B requests, K block size, T tokens per block, Vd draft vocabulary.
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
from pipeline.drafts.dspark import Attend, DSparkDraft


class DSparkProposer(WithContext):
    """Proposes blocks with a DSparkDraft.

    Args:
        draft: not modified; the proposer works on a copy whose linears may be prepacked.
        rule: verification rule, which decides the noise that tokens are drawn with.
        pack: prepack linears (CPU, fp32).
    """

    name = "dspark"

    def __init__(self, draft: DSparkDraft, *, rule: str = "coupled", pack: bool = True) -> None:
        super().__init__()
        self.draft: DSparkDraft = copy.deepcopy(draft, draft.borrowed()).eval().requires_grad_(False)
        into_dtype(self.draft, draft.dtype)
        c = self.config = draft.config
        self.block_size = c.tokens_per_block
        self.layer_ids = list(c.target_layer_ids)
        self.rule = rule
        self.device = draft.embed.device
        layers = [
            LayerAttention(c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim, c.head_dim**-0.5, c.window(i), 0.0, i)
            for i in range(c.num_layers)
        ]
        self.context = DraftContext(layers, draft.dtype, self.device)
        self._lm_head = None
        if pack and self.device.type == "cpu" and draft.dtype == torch.float32 and available():
            prepack(self.draft)
            self._lm_head = PackedLinear(self.draft.lm_rows)
        # On CPU the head's prepacked matrix is faster than the reference's plain one.
        self._fused = self.device.type == "cuda" and self.draft.confidence_head is not None

    @torch.inference_mode()
    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        if not commits:
            return
        if taps is None:
            raise RuntimeError("the DSpark proposer needs taps; the engine captured none")
        more = self.context.extend(commits, lambda c: c.rows.stop - c.rows.start)
        if more is None:
            return
        # As many rows need not be the same order: prompt chunks come last in a step and first among its commits.
        whole = more.rows == list(range(taps.shape[0]))
        chosen = taps if whole else taps[on_device(more.rows, taps.device)]
        context = self.draft.context(chosen.to(self.draft.dtype))
        for i, (k, v) in enumerate(self.draft.context_kv(context, more.positions)):
            self.context.cache.write(i, more.cells, k.transpose(0, 1), v.transpose(0, 1))

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> Proposal:
        # Slots of a block lie behind the context, in cells that the next commit overwrites.
        segments = [Segment(s.pages, self.context.length(s), self.config.block_size) for s in sequences]
        return self._proposal(Asked.of(sequences), segments, causal=False)

    def _draw(self, asked: Asked, layout: StepLayout | TableLayout) -> Drawn:
        batch, block = len(asked.anchors), self.block_size
        drawing = Drawing(self.draft, asked, self.rule)
        hidden = self.draft.blocks(asked.previous, asked.anchors, _attend(layout))
        if self._fused:
            return self._in_one(drawing, hidden.view(batch, block, -1))
        base = self.draft.cap(self._lm_head(hidden)) if self._lm_head is not None else self.draft.logits(hidden)
        base = base.view(batch, block, -1)
        hidden = hidden.view(batch, block, -1)
        state = None
        for k in range(block):
            bias, state = self.draft.markov_step(hidden[:, k], drawing.previous, state)
            drawing.draw(base[:, k] + bias)
        return drawing.drawn(self.draft.confidence(hidden, torch.stack(drawing.seen, 1)))

    def _in_one(self, drawing: Drawing, hidden: torch.Tensor) -> Drawn:
        """The same block from hidden states [B, G, D], by the kernel that draws all its slots."""
        draft = self.draft
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


def _attend(layout: StepLayout | TableLayout) -> Attend:
    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layout.attend(layer, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))

    return attend
