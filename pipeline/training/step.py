"""One training step's arithmetic: feature rows in, a loss and its metrics out. No Ray, no DeepSpeed.

Letters: S sequence length, A anchors, K block size, G tokens per block, N = sum over sequences of A * G, D hidden, L
taps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from draftline_kernels.sampling import largest
from pipeline.drafts.base import Draft
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.training.anchors import Blocks, sample_blocks
from pipeline.training.objectives import position_weights, vocab_loss
from pipeline.training.unroll import unrolled_hidden


class Row(Protocol):
    """What the step needs of a feature row (pipeline.features.FeatureRow)."""

    @property
    def sample_id(self) -> str: ...
    @property
    def input_ids(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def taps(self) -> Tensor: ...
    @property
    def last_hidden(self) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """Loss weights (eq. 12) and the decay of the position weights."""

    ce: float = 0.1
    kl: float = 0.0
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0


@dataclasses.dataclass
class StepMetrics:
    """Sums over supervised slots by position, ready to be added over ranks and steps: float64[K] each."""

    count: Tensor
    acceptance: Tensor
    agree: Tensor
    survival: Tensor
    greedy_survival: Tensor
    blocks: Tensor
    loss: float = 0.0

    @staticmethod
    def total(parts: Sequence[StepMetrics], reduce: Callable[[Tensor], Tensor] = lambda t: t) -> StepMetrics:
        """Metrics of several steps together: sums, summed over ranks by `reduce`; loss: the mean of a rank's steps,
        summed likewise (each rank's loss is its share)."""
        sums = {
            f.name: reduce(torch.stack([getattr(m, f.name) for m in parts]).sum(0))
            for f in dataclasses.fields(StepMetrics)
            if f.name != "loss"
        }
        return StepMetrics(**sums, loss=float(reduce(torch.tensor(sum(m.loss for m in parts) / len(parts)))))

    def summary(self) -> dict[str, float]:
        """Per-position acceptance (1 - TV) and greedy agreement, teacher-forced, and the tau each predicts."""
        n = self.count.clamp(min=1)
        acceptance, agree = (self.acceptance / n).tolist(), (self.agree / n).tolist()
        blocks = self.blocks.clamp(min=1)
        out = {
            "loss": self.loss,
            "tau": 1 + float((self.survival / blocks).sum()),
            "tau_greedy": 1 + float((self.greedy_survival / blocks).sum()),
        }
        for k, (a, g) in enumerate(zip(acceptance, agree, strict=True), start=1):
            out[f"acceptance_{k}"] = a
            out[f"agreement_{k}"] = g
        return out


class TrainStep:
    """Computes the loss of a batch of sequences.

    Args:
        draft: the module being trained. lm_head: [V, D], the target's whole output matrix: gives the exact
            normaliser of p, once per row (kept in memory, 4 bytes per position).
        autocast: compute dtype of products, or None for the draft's own.
        chunk: rows of the vocabulary loss at once; None: by the size of the draft vocabulary.
    """

    def __init__(
        self,
        draft: Draft,
        lm_head: Tensor,
        weights: Weights,
        *,
        num_anchors: int,
        seed: int,
        autocast: torch.dtype | None = None,
        chunk: int | None = None,
    ) -> None:
        self.draft, self.weights = draft, weights
        self.num_anchors, self.seed, self.chunk = num_anchors, seed, chunk
        self.autocast = autocast
        compute = autocast or draft.lm_rows.dtype
        self.compute = compute
        self.lm_head = lm_head.detach().to(compute)
        self.lm_rows = draft.lm_rows.detach().to(compute)
        self.softcap = draft.logit_softcap or 0.0
        self.t2d = torch.full((lm_head.shape[0],), -1, dtype=torch.int64)
        self.t2d[draft.d2t] = torch.arange(draft.d2t.shape[0])
        self._scored: dict[str, tuple[Tensor, Tensor]] = {}

    def blocks_of(self, row: Row, step: int) -> Blocks | None:
        """The blocks a row contributes at a step: a function of (seed, step, sample) only."""
        key = (self.seed * 1_000_003 + step) * 1_000_003 + int(row.sample_id[:12], 16)
        mask = row.loss_mask
        if isinstance(self.draft, Eagle3Draft):  # its blocks start from the tap before the anchor
            mask = mask & (torch.arange(len(mask)) > 0)
        return sample_blocks(mask, self.draft.config.tokens_per_block, self.num_anchors, key % (1 << 63))

    def __call__(
        self,
        rows: Sequence[Row],
        step: int,
        *,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
        world_size: int = 1,
    ) -> tuple[Tensor, StepMetrics]:
        """Loss of the rows.

        Args:
            reduce: sums a small tensor over data-parallel ranks; the denominators are global, so that every
                supervised token weighs the same wherever it is.
            world_size: gradients are averaged over this many ranks afterwards, which the loss makes up for.
        """
        picked = [(r, b) for r in rows if (b := self.blocks_of(r, step)) is not None]
        block = self.draft.config.tokens_per_block
        w = position_weights(block, self.weights.decay)
        if picked:
            supervised = torch.cat([b.supervised for _, b in picked])
            labels = torch.cat([self._labels(r, b) for r, b in picked])
        else:
            supervised = torch.zeros(0, block, dtype=torch.bool)
            labels = torch.zeros(0, block, dtype=torch.int64)
        draft_labels = torch.where(supervised, self.t2d[labels], torch.full_like(labels, -1))
        all_weight = w * supervised
        ce_weight = all_weight * (draft_labels >= 0)
        sums = reduce(torch.stack((all_weight.sum(), ce_weight.sum())))
        if not picked:
            return self._zero(), self._empty(block)
        keep = supervised.flatten().nonzero().squeeze(-1)
        device_type = self.draft.embed.device.type
        with torch.autocast(device_type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            hidden = self.hidden(picked)
            previous = torch.cat([self._previous(r, b) for r, b in picked])
            head = self.draft.markov_head
            markov = None
            if head is not None:
                markov = head.codes(hidden.unflatten(0, (-1, block)), previous).flatten(0, 1)[keep]
            hidden, previous = hidden[keep], previous.flatten()[keep]
            confidence = self.draft.confidence(hidden, previous)
        scale = world_size
        flat = all_weight.flatten()[keep]
        loss, stats = vocab_loss(
            hidden,
            markov,
            None if head is None else head.markov_w2.weight,
            self.lm_rows,
            torch.cat([self._target_hidden(r, b) for r, b in picked]).flatten(0, 1)[keep],
            torch.cat([self._target_scores(r, b)[0] for r, b in picked]).flatten()[keep],
            torch.cat([self._target_scores(r, b)[1] for r, b in picked]).flatten()[keep],
            draft_labels.flatten()[keep],
            ce_weight.flatten()[keep] * (self.weights.ce * scale / sums[1].clamp(min=1e-6)),
            flat * (self.weights.kl * scale / sums[0].clamp(min=1e-6)),
            flat * (self.weights.tv * scale / sums[0].clamp(min=1e-6)),
            softcap=self.softcap,
            chunk=self.chunk,
        )
        if confidence is not None and self.weights.confidence:
            bce = F.binary_cross_entropy_with_logits(confidence.float(), stats.acceptance.clamp(0, 1), reduction="none")
            loss = loss + (bce * flat).sum() * (self.weights.confidence * scale / sums[0].clamp(min=1e-6))
        return loss, self._metrics(supervised, keep, stats.acceptance, stats.agree, float(loss.detach()) / scale)

    def hidden(self, picked: list[tuple[Row, Blocks]]) -> Tensor:
        """The draft's hidden states [N, D] of all blocks of all sequences, in order."""
        draft, dtype = self.draft, self.autocast or self.draft.fc.weight.dtype
        if isinstance(draft, Eagle3Draft):
            texts = [r.input_ids.long() for r, _ in picked]
            return unrolled_hidden(draft, texts, [r.taps.to(dtype) for r, _ in picked], [b.anchors for _, b in picked])
        assert isinstance(draft, DSparkDraft)
        taps = torch.cat([r.taps for r, _ in picked]).to(dtype)
        positions = torch.cat([torch.arange(len(r.input_ids)) for r, _ in picked])
        kv = draft.context_kv(draft.context(taps), positions)
        tokens = torch.cat([r.input_ids[b.anchors].long() for r, b in picked])
        anchors = torch.cat([b.anchors for _, b in picked])
        lengths = [len(r.input_ids) for r, _ in picked]
        counts = [len(b.anchors) for _, b in picked]
        c = draft.config
        masks = {
            window: [
                _context_mask(b.anchors, n, c.block_size, window) for (_, b), n in zip(picked, lengths, strict=True)
            ]
            for window in {c.window(i) for i in range(c.num_layers)}
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block_attention(q, k, v, kv[layer], lengths, counts, masks[c.window(layer)], c.block_size)

        return draft.blocks(tokens, anchors, attend)

    def _labels(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(1, b.supervised.shape[1] + 1)
        return row.input_ids[at.clamp(max=len(row.input_ids) - 1)].long()

    def _previous(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1])
        return row.input_ids[at.clamp(max=len(row.input_ids) - 1)].long()

    def _target_hidden(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1])
        return row.last_hidden[at.clamp(max=len(row.input_ids) - 1)]

    def scores(self, row: Row) -> tuple[Tensor, Tensor]:
        """Of the target's logits over V at every position before a supervised token: log-sum-exp float32[S], and
        the draft id of the largest int64[S] (-1 outside the draft vocabulary). Computed once per row, then kept."""
        known = self._scored.get(row.sample_id)
        if known is None:
            normaliser = torch.zeros(len(row.input_ids))
            best = torch.full((len(row.input_ids),), -1)
            needed = F.pad(row.loss_mask[1:], (0, 1)).nonzero().squeeze(-1)
            for part in needed.split(128):
                logits = (row.last_hidden[part].to(self.compute) @ self.lm_head.T).float()
                if self.softcap:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                normaliser[part] = logits.logsumexp(-1)
                best[part] = self.t2d[largest(logits)[0]]
            known = self._scored[row.sample_id] = normaliser, best
        return known

    def _target_scores(self, row: Row, b: Blocks) -> tuple[Tensor, Tensor]:
        """`scores` at the position before each label: [A, K] each."""
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1])
        at = at.clamp(max=len(row.input_ids) - 1)
        normaliser, best = self.scores(row)
        return normaliser[at], best[at]

    def _metrics(self, supervised: Tensor, keep: Tensor, acceptance: Tensor, agree: Tensor, loss: float) -> StepMetrics:
        grid = torch.zeros(supervised.numel(), dtype=torch.float64)
        grid[keep] = acceptance.double().clamp(0, 1)
        grid = grid.view(supervised.shape)
        agreed = torch.zeros(supervised.numel(), dtype=torch.float64)
        agreed[keep] = agree.double()
        agreed = agreed.view(supervised.shape)
        whole = supervised.all(1)
        return StepMetrics(
            supervised.double().sum(0),
            grid.sum(0),
            agreed.sum(0),
            grid[whole].cumprod(1).sum(0),
            agreed[whole].cumprod(1).sum(0),
            whole.double().sum().expand(supervised.shape[1]).clone(),
            loss,
        )

    def _zero(self) -> Tensor:
        total = sum(p.sum() for p in self.draft.parameters() if p.requires_grad)
        return total * 0.0  # type: ignore[return-value]

    @staticmethod
    def _empty(block: int) -> StepMetrics:
        zeros = [torch.zeros(block, dtype=torch.float64) for _ in range(6)]
        return StepMetrics(*zeros)  # type: ignore[arg-type]


def _context_mask(anchors: Tensor, length: int, block: int, window: int) -> Tensor:
    """Additive float[A*K, S]: a slot sees positions strictly before its block's anchor, and less than `window` before
    its own (0: any)."""
    at = torch.arange(length)
    hidden = (at >= anchors[:, None]).repeat_interleave(block, 0)
    if window:
        hidden |= at <= (anchors[:, None] + torch.arange(block)).flatten()[:, None] - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor],
    lengths: list[int],
    counts: list[int],
    masks: list[Tensor],
    block: int,
) -> Tensor:
    """Attention of blocks over context + own block, exact, without a mask over all blocks of all sequences.

    One softmax spans two score tensors: blocks x context of the same sequence, and block x itself.

    Args:
        q: [N, H, d]; k, v: [N, Hkv, d] of the block slots; context: (k, v) [sum S, Hkv, d].
        lengths, counts: S and A per sequence. masks: additive [A*K, S] per sequence.
    Returns:
        [N, H, d].
    """
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    scale = dim**-0.5
    outputs = []
    slot, position = 0, 0
    for length, count, mask in zip(lengths, counts, masks, strict=True):
        here = slice(slot, slot + count * block)
        there = slice(position, position + length)
        slot, position = here.stop, there.stop
        # [Hkv, G, A*K, d]
        qs = (q[here] * scale).view(count * block, kv_heads, groups, dim).permute(1, 2, 0, 3)
        kc = context[0][there].transpose(0, 1)
        vc = context[1][there].transpose(0, 1)
        kb = k[here].view(count, block, kv_heads, dim).permute(2, 0, 1, 3)
        vb = v[here].view(count, block, kv_heads, dim).permute(2, 0, 1, 3)
        far = (qs.flatten(1, 2) @ kc.transpose(1, 2)).view(kv_heads, groups, count * block, length) + mask
        grid = qs.reshape(kv_heads, groups, count, block, dim)
        near = torch.einsum("hgakd,hajd->hgakj", grid, kb).reshape(kv_heads, groups, count * block, block)
        weights = torch.cat((far.float(), near.float()), dim=-1).softmax(-1).to(v.dtype)
        out = weights[..., :length].reshape(kv_heads, -1, length) @ vc
        own = weights[..., length:].reshape(kv_heads, groups, count, block, block)
        own = torch.einsum("hgakj,hajd->hgakd", own, vb).reshape(kv_heads, -1, dim)
        out = (out + own).view(kv_heads, groups, count * block, dim)
        outputs.append(out.permute(2, 0, 1, 3).reshape(count * block, heads, dim))
    return torch.cat(outputs)
