"""What an experiment takes before anybody pays for it: bytes of features, memory of training, GPU-hours.

Parameters are counted on the modules themselves, built without memory from the target's config.json; bytes and products
follow from what the rooms do with them. Only activations are an estimate, and rates an assumption: both say so.

Letters: P trainable parameters of the draft, W workers, S tokens of a row, A anchors of a row, K slots of a block, L
taps, D hidden, V and Vd vocabularies, r Markov rank.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from draftline_kernels.vocab_loss import rows_per_chunk
from pipeline import artifact
from pipeline.config import PipelineConfig, TargetConfig
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import ALGORITHMS
from pipeline.drafts.config import resolve
from pipeline.errors import ArtifactError, ConfigError, DraftlineError
from pipeline.target.families import ENGINE_OBSTACLES, check_family
from pipeline.target.obtain import config_file

GIB = 2**30
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_AHEAD = 3  # requests of a trainer for streamed features that exist at once: one in use, two on order


@dataclasses.dataclass(frozen=True)
class TargetSize:
    """A target without its weights.

    Attributes:
        parameters: all of them. active: those that a token's forward multiplies with, of the layers alone (no
            embedding, no lm_head; of experts the share that a token is routed to).
        attention: products of a token with each token before it, over all layers (attention counted as full).
        tied: lm_head is the embedding.
    """

    config: Any
    parameters: int
    active: float
    attention: int
    tied: bool

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)


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
        of_blocks = slots * c.num_layers * wide * (c.tokens_per_block if c.algorithm == "eagle3" else 1)
        if c.algorithm == "eagle3":
            of_blocks /= c.block_size  # a block is one slot at a time, unrolled
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
        return int((self.config.deepspeed.get("zero_optimization") or {}).get("stage", 0))

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
        frozen = slots * vd * d * products + trainer.sequences_per_step * self.loss_tokens_per_row * v * d
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
        found, cluster = [], self.config.cluster
        if cluster.gpu_memory_gib:
            room = cluster.gpu_memory_gib * GIB
            per_actor = room * self.config.features.gpus_per_actor
            if self.extractor_bytes > per_actor:
                found.append(
                    f"An extracting actor needs {self.extractor_bytes / GIB:.0f} GiB; "
                    f"{self.config.features.gpus_per_actor} GPUs have {per_actor / GIB:.0f}. Raise "
                    "features.gpus_per_actor (with target.device=auto), or take larger GPUs."
                )
            if (need := self.memory(self.stage).total) > room:
                fits = [s for s in (1, 2, 3) if self.memory(s).total <= room]
                remedy = f"deepspeed=zero{fits[0]}" if fits else "fewer trainer.num_anchors, more trainer.accumulate"
                found.append(
                    f"A training rank needs {need / GIB:.0f} GiB under ZeRO-{self.stage}; a GPU has "
                    f"{room / GIB:.0f}. Use {remedy}."
                )
        gpus = self.config.trainer.workers
        if self.config.features.mode == "stream":
            gpus += self.config.features.actors * self.config.features.gpus_per_actor
        else:
            gpus = max(gpus, self.config.features.actors * self.config.features.gpus_per_actor)
        if self.config.trainer.use_gpu and cluster.gpus and gpus > cluster.gpus:
            found.append(
                f"{gpus} GPUs are needed at once; the cluster has {cluster.gpus}. Use fewer trainer.workers or "
                "features.actors."
            )
        if self.config.features.mode == "store" and 0 < cluster.storage_gib * GIB < self.store_bytes:
            found.append(
                f"Stored features take {self.store_bytes / GIB:,.0f} GiB; cluster.storage_gib={cluster.storage_gib}. "
                "Use features=stream, which keeps nothing on disk."
            )
        if self.config.features.mode == "stream" and self.stream_bytes > cluster.object_store_gib * GIB:
            found.append(
                f"Streamed features take up to {self.stream_bytes / GIB:.0f} GiB of the object store; "
                f"cluster.object_store_gib={cluster.object_store_gib:g}. Use a smaller features.shard_rows."
            )
        return found

    @property
    def notes(self) -> list[str]:
        """What is not an obstacle but must be known."""
        whole = self.target.parameters * ITEM[self.config.target.dtype]
        found = [
            f"every training worker reads the target into the host's memory as it starts: {_bytes(whole)} each, of "
            f"{self.config.trainer.workers} workers"
        ]
        if obstacle := ENGINE_OBSTACLES.get(self.target.config.model_type):
            found.append(
                f"draftline's engine does not decode {self.target.config.model_type} targets ({obstacle}): train the "
                "draft, export it (export.version=trained) and measure it in vLLM or SGLang."
            )
        return found

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


def size_target(target: TargetConfig, file: str, cache: Path) -> TargetSize:
    """Counts a target's parameters from its config.json, without its weights.

    Args:
        file: the config.json; "" takes the target's own (of the hub, only that file is fetched).
    Raises:
        DraftlineError: no such file, not a model's, or of a family that is not supported.
    """
    path = Path(file) if file else config_file(target, cache)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        check_family(config.model_type)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as e:
        raise DraftlineError(f"{path} is not the config.json of a model that transformers can build: {e}") from None
    text = config.get_text_config()
    named = dict(model.named_parameters())
    experts = sum(q.numel() for n, q in named.items() if ".experts." in n)
    share = 0.0
    if experts:
        of = getattr(text, "num_experts", None) or text.n_routed_experts
        share = experts * text.num_experts_per_tok / of
    layers = sum(q.numel() for n, q in named.items() if ".layers." in n and ".experts." not in n)
    kinds = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers  # Gemma 4's layers differ
    widths = [
        k.num_attention_heads * (getattr(k, "head_dim", 0) or k.hidden_size // k.num_attention_heads) for k in kinds
    ]
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return TargetSize(
        text,
        sum(q.numel() for q in named.values()),
        layers + share,
        2 * sum(widths),
        tied,
    )


def plan(config: PipelineConfig) -> Plan:
    """Sizes an experiment. Its corpus is the run's own if it has one, else what `plan.rows` and its like assume.

    Raises:
        ConfigError: no corpus and no assumption, a draft that can't fit the target.
        DraftlineError: see `size_target`.
    """
    target = size_target(config.target, config.plan.target_config, config.cache)
    full = resolve(config.draft, target.config, target.vocabulary - 1)
    vd = full.draft_vocab_size or target.vocabulary
    with torch.device("meta"):
        borrowed = torch.empty(target.vocabulary, target.hidden)
        draft = ALGORITHMS[full.algorithm](full, borrowed, borrowed, torch.empty(vd, dtype=torch.int64))
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


def show(p: Plan) -> str:
    """The plan as text, for a terminal."""
    c, t, config = p.draft.config, p.target, p.config
    trainer, assumed = config.trainer, config.plan
    active = f" ({t.active / 1e9:.1f} B active in the layers)" if t.active < 0.5 * t.parameters else ""
    corpus = "assumed: plan.rows, plan.tokens_per_row" if p.assumed else "the run's own corpus"
    item = config.features.compute_dtype or config.target.dtype
    lines = [
        f"plan: {config.name}",
        f"target    {config.target.path}: {t.config.num_hidden_layers} layers, hidden {t.hidden}, vocabulary "
        f"{t.vocabulary}; {t.parameters / 1e9:.2f} B parameters{active}",
        f"draft     {c.algorithm}, {c.num_layers} layer{'s' if c.num_layers > 1 else ''}, block {c.block_size}, taps "
        f"{c.target_layer_ids}, vocabulary {p.draft.d2t.shape[0]}; {p.parameters / 1e6:.1f} M trainable parameters",
        f"corpus    {p.rows:,} rows x {p.tokens_per_row:.0f} tokens = {p.tokens / 1e6:,.1f} M ({corpus})",
        f"features  {p.bytes_per_token:,} bytes a token; configured: {config.features.mode}",
        f"            store   {_bytes(p.store_bytes)} on disk",
        f"            stream  nothing on disk, at most {_bytes(p.stream_bytes)} in the object store",
        f"extract   an actor holds {_bytes(p.extractor_bytes)} ({item}, {config.features.batch_tokens} tokens a "
        f"forward), {config.features.actors} actors of {config.features.gpus_per_actor} GPU",
        f"train     {trainer.steps:,} steps of {trainer.sequences_per_step} rows = {p.epochs:.2f} epochs on "
        f"{trainer.workers} workers; GiB of a rank, activations estimated for rows of {config.corpus.max_length}:",
        "            ZeRO   weights gradients optimizer    frozen activations     total",
    ]
    for stage in (1, 2, 3):
        m = p.memory(stage)
        parts = (m.weights, m.gradients, m.optimizer, m.frozen, m.activations, m.total)
        mark = "  <- configured" if stage == p.stage else ""
        host = f", and {_bytes(m.host)} of the host" if m.host else ""
        lines.append(
            f"            {stage:<4}" + "".join(f"{x / GIB:>10.2f}" for x in parts[:-2])
            + f"{parts[-2] / GIB:>12.2f}{parts[-1] / GIB:>10.2f}{mark}{host if mark else ''}"
        )  # fmt: skip
    stages = (
        ("extract", p.extract_flops, assumed.extract_utilisation),
        ("train", p.step_flops * trainer.steps, assumed.train_utilisation),
    )
    for name, flops, utilisation in stages:
        hours = p.hours(flops, utilisation)
        text = f"time      {name:<8}{flops / 1e15:,.3g} PFLOP"
        if hours is None:
            text += "; no rate to turn it into hours (plan.tflops)"
        else:
            text += f" = {hours:,.1f} GPU-hours at {assumed.tflops:g} TFLOP/s x {utilisation:.0%} (assumed)"
            text += f", {hours * assumed.price_per_gpu_hour:,.0f} in money" if assumed.price_per_gpu_hour else ""
        lines.append(text)
    lines += [f"note      {note}" for note in p.notes]
    lines += [f"OBSTACLE  {o}" for o in p.obstacles] or ["verdict   fits the cluster of the config"]
    return "\n".join(lines)


def save(p: Plan, out: Path) -> None:
    """Writes plan.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(out, json.loads(json.dumps(p.as_dict())))


def _bytes(n: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1024:,.1f} KiB"
