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

from draftline_kernels.truncation import largest
from pipeline.drafts.base import Draft
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.training.anchors import Blocks, sample_blocks
from pipeline.training.attention import packed_attention
from pipeline.training.objectives import position_weights, vocab_loss
from pipeline.training.unroll import unrolled_hidden

_POSITIONS_KEPT = 1 << 26  # 12 bytes each, on the draft's device: 0.8 GB


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
class _PlacedRow:
    """A Row on the draft's device."""

    sample_id: str
    input_ids: Tensor
    loss_mask: Tensor
    taps: Tensor
    last_hidden: Tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """Loss weights (eq. 12, and the further terms of `draftline_kernels.vocab_loss`; lk_eta is its eta), and the decay
    of the position weights that a step starts with."""

    ce: float = 0.1
    kl: float = 0.0
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    reverse_kl: float = 0.0
    lk: float = 0.0
    lk_hybrid: float = 0.0
    lk_eta: float = 3.0


@dataclasses.dataclass
class StepMetrics:
    """Sums over supervised slots by position, ready to be added over ranks and steps: float64[K] each."""

    count: Tensor
    acceptance: Tensor
    agree: Tensor
    survival: Tensor
    greedy_survival: Tensor
    blocks: Tensor
    skipped: Tensor  # float64[]: sequences without a block
    loss: float = 0.0

    def __add__(self, other: StepMetrics) -> StepMetrics:
        """Of two parts of one step (their losses are shares of the step's)."""
        names = [f.name for f in dataclasses.fields(StepMetrics)]
        return StepMetrics(**{n: getattr(self, n) + getattr(other, n) for n in names})

    @staticmethod
    def total(parts: Sequence[StepMetrics], reduce: Callable[[Tensor], Tensor] = lambda t: t) -> StepMetrics:
        """Metrics of several steps together: sums, summed over ranks by `reduce`; loss: the mean of a rank's steps,
        summed likewise (each rank's loss is its share)."""
        sums = {
            f.name: reduce(torch.stack([getattr(m, f.name) for m in parts]).sum(0))
            for f in dataclasses.fields(StepMetrics)
            if f.name != "loss"
        }
        mean = torch.tensor(sum(m.loss for m in parts) / len(parts), device=parts[0].count.device)
        return StepMetrics(**sums, loss=float(reduce(mean)))

    def summary(self) -> dict[str, float]:
        """Per-position acceptance (1 - TV) and greedy agreement, teacher-forced, and the tau each predicts."""
        n = self.count.clamp(min=1)
        acceptance, agree = (self.acceptance / n).tolist(), (self.agree / n).tolist()
        blocks = self.blocks.clamp(min=1)
        out = {
            "loss": self.loss,
            "tau": 1 + float((self.survival / blocks).sum()),
            "tau_greedy": 1 + float((self.greedy_survival / blocks).sum()),
            "skipped_samples": float(self.skipped),
        }
        for k, (a, g) in enumerate(zip(acceptance, agree, strict=True), start=1):
            out[f"acceptance_{k}"] = a
            out[f"agreement_{k}"] = g
        return out


class TrainStep:
    """Computes the loss of a batch of sequences. Everything is on the draft's device; rows may come from another.

    Args:
        draft: the module being trained, on its device already. lm_head: [V, D], the target's whole output matrix:
            gives the exact normaliser of p.
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
        self.dtype = autocast or draft.fc.weight.dtype
        compute = autocast or draft.dtype
        self.compute = compute
        device = self.device = draft.embed.device
        full = self._full = draft.d2t.shape[0] == lm_head.shape[0]
        own = draft.config.own_lm_head
        rows = draft.lm_rows if not own else lm_head if full else lm_head[draft.d2t.to(lm_head.device)]
        self.target_rows = rows.detach().to(device, compute)
        self.lm_head = self.target_rows if full else lm_head.detach().to(device, compute)
        self.softcap = draft.logit_softcap or 0.0
        self.t2d = torch.full((lm_head.shape[0],), -1, dtype=torch.int64, device=device)
        self.t2d[draft.d2t] = torch.arange(draft.d2t.shape[0], device=device)
        self._host_t2d = self.t2d.cpu()
        self._scored: dict[str, tuple[Tensor, Tensor]] = {}
        self._positions_scored = 0
        self.weigh_positions(position_weights(draft.config.tokens_per_block, weights.decay))

    def weigh_positions(self, weights: Tensor) -> None:
        """Gives the slots of a block other weights, float32[K], in the losses and in their denominators."""
        self.position_weights, self._host_weights = weights.to(self.device), weights.cpu().double()

    def blocks_of(self, row: Row, step: int) -> Blocks | None:
        """The blocks a row contributes at a step, on CPU: a function of (seed, step, sample) only, whatever the draft's
        device."""
        key = (self.seed * 1_000_003 + step) * 1_000_003 + int(row.sample_id[:12], 16)
        mask = row.loss_mask.cpu()
        if isinstance(self.draft, Eagle3Draft):  # its blocks start from the tap before the anchor
            mask = mask & (torch.arange(len(mask)) > 0)
        return sample_blocks(mask, self.draft.config.tokens_per_block, self.num_anchors, key % (1 << 63))

    def denominators(self, rows: Sequence[Row], step: int) -> Tensor:
        """float64[2]: the summed position weights of the rows' supervised slots, and of those among them whose label is
        in the draft vocabulary. They depend on rows (which are on CPU) and step alone: known before any forward."""
        total = torch.zeros(2, dtype=torch.float64)
        for row in rows:
            if (b := self.blocks_of(row, step)) is not None:
                weight = self._host_weights * b.supervised
                inside = self._host_t2d[self._labels(row, b)] >= 0
                total += torch.stack((weight.sum(), (weight * inside).sum()))
        return total.to(self.device)

    def __call__(
        self, rows: Sequence[Row], step: int, denominators: Tensor | None = None, scale: float = 1.0
    ) -> tuple[Tensor, StepMetrics]:
        """Loss of the rows; gradients reach every parameter whether or not a row has a block, so that collectives that
        follow the modules (ZeRO-3) run on every rank alike.

        Args:
            denominators: what sums over slots are divided by, as `denominators` gives it, of all the rows that share a
                weight of one: those of the whole step, over ranks and microbatches, for tokens to weigh equally. None
                takes those of `rows`.
            scale: the loss is multiplied by it, the metrics' loss is not: for the mean over ranks and microbatches that
                is taken of gradients afterwards.
        """
        found = [(r, self.blocks_of(r, step)) for r in rows]
        picked = [self._placed(r, b) for r, b in found if b is not None] or [self._nothing()]
        block = self.draft.config.tokens_per_block
        sums = self.denominators(rows, step) if denominators is None else denominators
        supervised = torch.cat([b.supervised for _, b in picked])
        draft_labels, all_weight, ce_weight = self._slots(picked)
        keep = supervised.flatten().nonzero().squeeze(-1)
        with torch.autocast(self.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            hidden = self.hidden(picked)
            previous = torch.cat([self._previous(r, b) for r, b in picked])
            head = self.draft.markov_head
            markov = None
            if head is not None:
                markov = head.codes(hidden.unflatten(0, (-1, block)), previous).flatten(0, 1)[keep]
            hidden, previous = hidden[keep], previous.flatten()[keep]
            confidence = self.draft.confidence(hidden, previous)
        flat = all_weight.flatten()[keep]
        # Of the whole vocabulary the loss forms every target logit itself.
        scored = None if self._full else [self._target_scores(r, b) for r, b in picked]
        w, every = self.weights, scale / sums[0].clamp(min=1e-6)
        more = {"rkl_weight": w.reverse_kl, "lk_weight": w.lk, "hybrid_weight": w.lk_hybrid}
        loss, stats = vocab_loss(
            hidden,
            markov,
            None if head is None else head.markov_w2.weight,
            self.draft.lm_rows.to(self.compute) if self.draft.config.own_lm_head else self.target_rows,
            torch.cat([self._target_hidden(r, b) for r, b in picked]).flatten(0, 1)[keep],
            None if scored is None else torch.cat([normaliser for normaliser, _ in scored]).flatten()[keep],
            None if scored is None else torch.cat([best for _, best in scored]).flatten()[keep],
            draft_labels.flatten()[keep],
            ce_weight.flatten()[keep] * (w.ce * scale / sums[1].clamp(min=1e-6)),
            flat * (w.kl * every),
            flat * (w.tv * every),
            **{name: flat * (weight * every) for name, weight in more.items() if weight},
            eta=w.lk_eta,
            softcap=self.softcap,
            chunk=self.chunk,
            target_rows=self.target_rows,
        )
        if confidence is not None and w.confidence:
            bce = F.binary_cross_entropy_with_logits(confidence.float(), stats.acceptance.clamp(0, 1), reduction="none")
            loss = loss + (bce * flat).sum() * (w.confidence * every)
        metrics = self._metrics(supervised, keep, stats.acceptance, stats.agree, float(loss.detach()) / scale)
        metrics.skipped += sum(b is None for _, b in found)
        return loss, metrics

    def hidden(self, picked: list[tuple[Row, Blocks]]) -> Tensor:
        """The draft's hidden states [N, D] of all blocks of all sequences, in order."""
        draft, dtype = self.draft, self.dtype
        picked = [self._placed(r, b) for r, b in picked]
        if isinstance(draft, Eagle3Draft):
            texts = [r.input_ids.long() for r, _ in picked]
            return unrolled_hidden(draft, texts, [r.taps.to(dtype) for r, _ in picked], [b.anchors for _, b in picked])
        assert isinstance(draft, DSparkDraft)
        taps = torch.cat([r.taps for r, _ in picked]).to(dtype)
        positions = torch.cat([torch.arange(len(r.input_ids), device=self.device) for r, _ in picked])
        kv = draft.context_kv(draft.context(taps), positions)
        tokens = torch.cat([r.input_ids[b.anchors].long() for r, b in picked])
        anchors = torch.cat([b.anchors for _, b in picked])
        lengths = [len(r.input_ids) for r, _ in picked]
        c = draft.config
        windows = [c.window(i) for i in range(c.num_layers)]
        attention = packed_attention(lengths, [b.anchors for _, b in picked], c.block_size, windows)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, kv[layer], windows[layer])

        return draft.blocks(tokens, anchors, attend)

    def _slots(self, picked: list[tuple[Row, Blocks]]) -> tuple[Tensor, Tensor, Tensor]:
        """Per slot [A, K] of all sequences: draft id of its label (-1 outside the draft vocabulary or unsupervised),
        its weight, and its weight in the cross-entropy."""
        supervised = torch.cat([b.supervised for _, b in picked])
        labels = torch.cat([self._labels(r, b) for r, b in picked])
        draft_labels = torch.where(supervised, self.t2d[labels], torch.full_like(labels, -1))
        weight = self.position_weights * supervised
        return draft_labels, weight, weight * (draft_labels >= 0)

    def _placed(self, row: Row, b: Blocks) -> tuple[Row, Blocks]:
        """Both on the draft's device."""
        names = ("input_ids", "loss_mask", "taps", "last_hidden")
        tensors = {n: getattr(row, n).to(self.device, non_blocking=True) for n in names}
        return _PlacedRow(row.sample_id, **tensors), b.to(self.device)

    def _nothing(self) -> tuple[Row, Blocks]:
        """A block of which no slot counts, for a batch without any."""
        width, hidden = len(self.draft.config.target_layer_ids), self.draft.config.hidden_size
        row = _PlacedRow(
            "0" * 32,
            torch.zeros(2, dtype=torch.int64, device=self.device),
            torch.zeros(2, dtype=torch.bool, device=self.device),
            torch.zeros(2, width * hidden, dtype=self.compute, device=self.device),
            torch.zeros(2, hidden, dtype=self.compute, device=self.device),
        )
        none = torch.zeros(1, self.draft.config.tokens_per_block, dtype=torch.bool)
        return row, Blocks(torch.ones(1, dtype=torch.int64), none).to(self.device)

    def _labels(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(1, b.supervised.shape[1] + 1, device=b.anchors.device)
        return row.input_ids[at.clamp(max=len(row.input_ids) - 1)].long()

    def _previous(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1], device=self.device)
        return row.input_ids[at.clamp(max=len(row.input_ids) - 1)].long()

    def _target_hidden(self, row: Row, b: Blocks) -> Tensor:
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1], device=self.device)
        return row.last_hidden[at.clamp(max=len(row.input_ids) - 1)]

    def scores(self, row: Row) -> tuple[Tensor, Tensor]:
        """Of the target's logits over V at every position before a supervised token: log-sum-exp float32[S], and
        the draft id of the largest int64[S] (-1 outside the draft vocabulary). Kept for the next epoch
        as far as memory is set aside for that."""
        known = self._scored.get(row.sample_id)
        if known is None:
            normaliser = torch.zeros(len(row.input_ids), device=self.device)
            best = torch.full((len(row.input_ids),), -1, device=self.device)
            needed = F.pad(row.loss_mask[1:], (0, 1)).nonzero().squeeze(-1)
            for part in needed.split(128) if len(needed) else ():
                logits = (row.last_hidden[part].to(self.compute) @ self.lm_head.T).float()
                if self.softcap:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                normaliser[part] = logits.logsumexp(-1)
                best[part] = self.t2d[largest(logits)[0]]
            known = normaliser, best
            if self._positions_scored < _POSITIONS_KEPT:
                self._positions_scored += len(best)
                self._scored[row.sample_id] = known
        return known

    def _target_scores(self, row: Row, b: Blocks) -> tuple[Tensor, Tensor]:
        """`scores` at the position before each label: [A, K] each."""
        at = b.anchors[:, None] + torch.arange(b.supervised.shape[1], device=self.device)
        at = at.clamp(max=len(row.input_ids) - 1)
        normaliser, best = self.scores(row)
        return normaliser[at], best[at]

    def _metrics(self, supervised: Tensor, keep: Tensor, acceptance: Tensor, agree: Tensor, loss: float) -> StepMetrics:
        grid = torch.zeros(supervised.numel(), dtype=torch.float64, device=self.device)
        grid[keep] = acceptance.double().clamp(0, 1)
        grid = grid.view(supervised.shape)
        agreed = torch.zeros(supervised.numel(), dtype=torch.float64, device=self.device)
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
            torch.zeros((), dtype=torch.float64, device=self.device),
            loss,
        )
