"""What an experiment takes before anybody pays for it: bytes of features, memory of training, GPU-hours.

Parameters are counted on the modules themselves, built without memory from the target's config.json; bytes and products
follow from what the rooms do with them. Only activations are an estimate, and rates an assumption: both say so.

Letters: P trainable parameters of the draft, W workers, S tokens of a row, A anchors of a row, K slots of a block, L
taps, D hidden, V and Vd vocabularies, r Markov rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from draftline_kernels.vocab_loss import rows_per_chunk
from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.config_values import zero_stage
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import ALGORITHMS
from pipeline.drafts.config import default_layer_ids, resolve, tapping
from pipeline.errors import ArtifactError, ConfigError
from pipeline.sizing import cluster
from pipeline.sizing.target import TargetSize, size_target

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_AHEAD = 3  # requests of a trainer for streamed features that exist at once: one in use, two on order


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a rank of training holds on its device, and in the host's memory where the optimizer is there."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    frozen: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.frozen + self.activations


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of an experiment; bytes, floating-point operations, hours."""

    config: PipelineConfig
    target: TargetSize
    draft: Draft
    rows: int
    tokens_per_row: float
    loss_tokens_per_row: float
    assumed: bool

    @property
    def tokens(self) -> float:
        return self.rows * self.tokens_per_row

    # -- features -----------------------------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> int:
        """Taps and last hidden in bf16, int32 id, uint8 mask."""
        return (len(self.draft.config.target_layer_ids) + 1) * self.target.hidden * 2 + 5

    @property
    def store_bytes(self) -> float:
        """Of the stored shards, their offsets and sample ids with them."""
        return self.tokens * self.bytes_per_token + self.rows * (8 + 36)

    @property
    def stream_bytes(self) -> float:
        """The most that streamed features take in the object store."""
        trainer = self.config.trainer
        rows = max(self.config.features.shard_rows, trainer.sequences_per_step // trainer.workers)
        return _AHEAD * trainer.workers * rows * self.tokens_per_row * self.bytes_per_token

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def extractor_bytes(self) -> float:
        """Of an extracting actor: the target's weights and the widest activations of a forward."""
        item = ITEM[self.config.features.compute_dtype or self.config.target.dtype]
        text, tokens = self.target.config, self.config.features.batch_tokens
        wide = max(4 * text.intermediate_size, 8 * text.hidden_size)
        return self.target.parameters * item + tokens * (wide * item + self.bytes_per_token)

    def memory(self, stage: int) -> Memory:
        """Of a training rank under a ZeRO stage."""
        trainer, c = self.config.trainer, self.draft.config
        p, w = float(self.parameters), trainer.workers
        half = bool((self.config.deepspeed.get("bf16") or {}).get("enabled"))
        offload = (self.config.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
        item = 2 if half else 4
        compute = 2 if half or trainer.autocast else 4
        copies = 0 if half or not trainer.autocast else p * 2  # what autocast keeps of the weights during a step
        states = 12 * p / w + (4 * p / w if trainer.ema else 0)  # fp32 masters, two moments, the running average
        d, v, vd = self.target.hidden, self.target.vocabulary, self.draft.d2t.shape[0]
        frozen = v * d * compute + (vd * d * compute if vd < v else 0)
        frozen += 0 if c.own_embedding else v * d * ITEM[self.config.target.dtype]

        sequences = trainer.sequences_per_step // (w * trainer.accumulate)
        length = float(self.config.corpus.max_length)
        anchors = min(trainer.num_anchors, length)
        tokens, slots = sequences * length, sequences * anchors * c.block_size
        wide = 8 * d + 4 * c.num_heads * c.head_dim + 4 * c.num_kv_heads * c.head_dim + 4 * c.intermediate_size
        context = len(c.target_layer_ids) * d + 3 * d + c.num_layers * 4 * c.num_kv_heads * c.head_dim
        of_blocks = slots * c.num_layers * wide
        if c.algorithm == "eagle3" and not trainer.use_gpu:
            # Its attention keeps what every anchor's steps give to the whole row; 1.7 was measured on autograd.
            of_blocks += 1.7 * sequences * anchors * length * c.num_heads * c.tokens_per_block
        device = torch.device("cuda" if trainer.use_gpu else "cpu")
        chunk = trainer.chunk_rows or rows_per_chunk(int(slots), vd, compute, device)
        loss = 3 * chunk * vd * compute + chunk * v * compute + slots * (d + c.markov_rank) * 4
        loss += vd * d * 4 if c.own_lm_head else 0
        return Memory(
            stage,
            weights=(p * item / w if stage == 3 else p * item) + copies,
            gradients=p * item / w if stage >= 2 else p * item,
            optimizer=0.0 if offload else states,
            frozen=frozen,
            activations=(tokens * context + of_blocks) * compute + loss,
            host=states if offload else 0.0,
        )

    @property
    def stage(self) -> int:
        """ZeRO's, of the configuration."""
        return zero_stage(self.config.deepspeed)

    @property
    def target_item(self) -> int:
        """Bytes of one of the target's weights."""
        return ITEM[self.config.target.dtype]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.draft.parameters() if p.requires_grad)

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def extract_flops(self) -> float:
        """Of the frozen forward over the corpus once, or where features stream over every row that training reads: two
        per weight and token, and attention over half a row."""
        passes = self.epochs if self.config.features.mode == "stream" else 1.0
        return passes * self.tokens * (2 * self.target.active + self.target.attention * self.tokens_per_row)

    @property
    def step_flops(self) -> float:
        """Of an optimizer step, over all ranks: forward, and backward at twice its cost where weights train."""
        trainer, c = self.config.trainer, self.draft.config
        d, v, vd = self.target.hidden, self.target.vocabulary, self.draft.d2t.shape[0]
        tokens = trainer.sequences_per_step * self.tokens_per_row
        anchors = min(trainer.num_anchors, self.loss_tokens_per_row)
        slots = trainer.sequences_per_step * anchors * c.block_size
        kv, q = 2 * c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
        context = tokens * (len(c.target_layer_ids) * d * d + c.num_layers * d * kv)
        width = 2 * d if c.algorithm == "eagle3" else d
        per_slot = width * (q + kv) + q * d + 3 * d * c.intermediate_size + 2 * q * (self.tokens_per_row / 2)
        markov = slots * vd * c.markov_rank if c.has_markov else 0.0
        # Three products of a slot: its logits, the target's, and the gradient; a fourth where lm_head is trained.
        products = 4 if c.own_lm_head else 3
        frozen = slots * vd * d * products
        if vd < v:  # the target's scores over the whole
            frozen += trainer.sequences_per_step * self.loss_tokens_per_row * v * d
        return 2 * (3 * (context + slots * c.num_layers * per_slot + markov) + frozen)

    @property
    def epochs(self) -> float:
        return self.config.trainer.steps * self.config.trainer.sequences_per_step / self.rows

    def hours(self, flops: float, utilisation: float) -> float | None:
        """GPU-hours at the assumed rate; None where none is given."""
        rate = self.config.plan.tflops * 1e12 * utilisation
        return flops / rate / 3600 if rate else None

    # -- verdict ------------------------------------------------------------------------------------------------------

    @property
    def obstacles(self) -> list[str]:
        """Why the experiment would not fit the cluster of its config; empty if it does."""
        return cluster.obstacles(self)

    @property
    def notes(self) -> list[str]:
        """What is not an obstacle but must be known."""
        return cluster.notes(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, as plan.json holds them."""
        plan = self.config.plan
        return {
            "target": self.config.target.path,
            "target_parameters": self.target.parameters,
            "target_active_parameters": self.target.active,
            "draft_parameters": self.parameters,
            "rows": self.rows,
            "tokens": self.tokens,
            "corpus_assumed": self.assumed,
            "bytes_per_token": self.bytes_per_token,
            "store_bytes": self.store_bytes,
            "stream_bytes": self.stream_bytes,
            "extractor_bytes": self.extractor_bytes,
            "memory": {str(s): dataclasses.asdict(m) | {"total": m.total} for s in (1, 2, 3) for m in [self.memory(s)]},
            "stage": self.stage,
            "epochs": self.epochs,
            "extract_flops": self.extract_flops,
            "train_flops": self.step_flops * self.config.trainer.steps,
            "extract_gpu_hours": self.hours(self.extract_flops, plan.extract_utilisation),
            "train_gpu_hours": self.hours(self.step_flops * self.config.trainer.steps, plan.train_utilisation),
            "obstacles": self.obstacles,
            "notes": self.notes,
        }


def plan(config: PipelineConfig) -> Plan:
    """Sizes an experiment. Its corpus is the run's own if it has one, else what `plan.rows` and its like assume.

    Raises:
        ConfigError: no corpus and no assumption, a draft that can't fit the target.
        DraftlineError: see `size_target`.
    """
    target = size_target(config.target, config.plan.target_config, config.cache)
    layers = list(config.features.target_layer_ids) or default_layer_ids(target.config.num_hidden_layers)
    draft_config = tapping(config.draft, layers, "features.target_layer_ids")  # as training does
    full = resolve(draft_config, target.config, target.vocabulary - 1)
    vd = full.draft_vocab_size or target.vocabulary
    with torch.device("meta"):
        borrowed = torch.empty(target.vocabulary, target.hidden)
        draft = ALGORITHMS[full.algorithm](
            full,
            borrowed,
            borrowed,
            torch.empty(vd, dtype=torch.int64),
            embed_scale=target.embed_scale,
            logit_softcap=target.logit_softcap,
        )
    try:
        counts = artifact.load(config.run_dir / "corpus", "corpus", verify=False).counts
        rows = counts["train_rows"]
        sizes, assumed = (counts["train_tokens"] / rows, counts["train_loss_tokens"] / rows), False
    except ArtifactError:
        rows, length = config.plan.rows, float(config.plan.tokens_per_row)
        sizes, assumed = (length, length * config.plan.loss_share), True
        if not rows or not length:
            raise ConfigError(
                f"{config.run_dir} has no corpus yet. Run jobs/corpus.py first, or say what to expect: "
                "plan.rows=1000000 plan.tokens_per_row=900."
            ) from None
    return Plan(config, target, draft, rows, *sizes, assumed)
