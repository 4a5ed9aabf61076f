"""Which values a configuration may have, beyond their types: choices, ranges, and what excludes each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, nearest

_CHOICES: dict[str, tuple[str, ...]] = {
    "engine.scheduler": ("global", "early_stop", "asynchronous", "threshold", "fixed"),
    "engine.rule": ("coupled", "ratio"),
    "features.mode": ("store", "stream"),
    "features.dtype": ("bfloat16",),
    "features.compute_dtype": ("", "float32", "bfloat16"),
    "target.dtype": ("float32", "bfloat16", "float16"),
    "corpus.regenerate.dtype": ("", "float32", "bfloat16", "float16"),
    "trainer.autocast": ("", "bfloat16"),
    "trainer.normalise": ("tokens", "microbatches"),
    "trainer.position_weights": ("fixed", "survival"),
    "trainer.warm_start.layers": ("auto", "target", "features", "none"),
    "draft.algorithm": ("dspark", "dflash", "eagle3"),
    "export.engine": ("vllm", "sglang"),
    "export.format": ("", "speculators", "specforge", "deepspec"),
    "convert.format": ("", "speculators", "specforge", "deepspec"),
    "draft.markov_head_type": ("none", "vanilla", "gated", "rnn"),
}
_POSITIVE = (
    "corpus.max_length",
    "corpus.regenerate.max_new_tokens",
    "corpus.regenerate.concurrency",
    "corpus.regenerate.actors",
    "features.shard_rows",
    "features.batch_tokens",
    "features.actors",
    "features.gpus_per_actor",
    "trainer.steps",
    "trainer.sequences_per_step",
    "trainer.accumulate",
    "trainer.num_anchors",
    "trainer.lr",
    "trainer.workers",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.chunk_rows",
    "trainer.decay",
    "engine.max_requests",
    "engine.max_queue",
    "engine.max_context",
    "engine.page_size",
    "engine.prefill_chunk",
    "benchmark.prompts",
    "benchmark.calibrate_prompts",
    "parity.prompts",
    "benchmark.max_new_tokens",
    "benchmark.bootstrap",
    "draft.block_size",
    "draft.num_layers",
    "cluster.num_cpus",
    "trainer.threads_per_worker",
    "serving.max_tokens",
)
_NOT_NEGATIVE = (
    "engine.threads",
    "engine.kv_gib",
    "corpus.max_rows",
    "corpus.min_loss_tokens",
    "corpus.regenerate.limit",
    "corpus.regenerate.threads",
    "corpus.regenerate.temperature",
    "corpus.regenerate.top_k",
    "trainer.weight_decay",
    "trainer.warmup_steps",
    "trainer.grad_clip",
    "trainer.ce",
    "trainer.kl",
    "trainer.tv",
    "trainer.confidence",
    "trainer.max_failures",
    "benchmark.temperature",
    "benchmark.seed",
    "parity.seed",
    "gate.min_prompts",
    "gate.min_tau",
    "serving.port",
    "plan.rows",
    "plan.tokens_per_row",
    "plan.tflops",
    "plan.price_per_gpu_hour",
)


def zero_stage(deepspeed: Mapping[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's settings.

    Raises:
        ConfigError: none, or one that training does not run (0, which shards nothing, among them).
    """
    stage = (deepspeed.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage={stage!r} must be 1, 2 or 3.")
    return int(stage)


def check_values(config: Any) -> None:
    """Raises ConfigError, with the dotted key, for a value of a PipelineConfig that is out of range or excludes
    another."""

    def get(key: str) -> Any:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in _CHOICES.items():
        if get(key) not in choices:
            shown = ", ".join(c or "''" for c in choices)
            raise ConfigError(f"{key}={get(key)!r} is not one of {shown}.{nearest(str(get(key)), choices)}")
    for key in _POSITIVE:
        if get(key) is not None and get(key) <= 0:
            raise ConfigError(f"{key}={get(key)!r} must be above 0.")
    for key in _NOT_NEGATIVE:
        if get(key) < 0:
            raise ConfigError(f"{key}={get(key)!r} must be 0 or more.")
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name in (".", ".."):
        raise ConfigError(
            f"name={config.name!r} is the folder of the run under output_root: give it letters, digits, '.', '_' and "
            "'-' only."
        )
    objectives = ("ce", "kl", "reverse_kl", "tv", "lk", "lk_hybrid")
    if not any(get(f"trainer.{name}") for name in objectives):
        names = ", ".join(f"trainer.{name}" for name in objectives)
        raise ConfigError(f"{names} are all 0: nothing would train the draft's tokens.")
    if not 0 <= get("corpus.heldout_fraction") < 1:
        raise ConfigError(f"corpus.heldout_fraction={get('corpus.heldout_fraction')} must be 0 or more and below 1.")
    if not 0 < get("corpus.regenerate.top_p") <= 1:
        raise ConfigError(f"corpus.regenerate.top_p={get('corpus.regenerate.top_p')} must be above 0 and at most 1.")
    device = get("target.device")
    if re.fullmatch(r"cuda:\d+", device) and device != "cuda:0":
        raise ConfigError(
            f"target.device={device!r}: Ray chooses the GPU of each actor, which sees no other and calls it number 0. "
            "Use target.device=cuda."
        )
    if device not in ("cpu", "cuda", "cuda:0", "auto"):
        raise ConfigError(f"target.device={device!r} is not one of cpu, cuda, auto.")
    for name in ("loss_share", "extract_utilisation", "train_utilisation"):
        if not 0 < get(f"plan.{name}") <= 1:
            raise ConfigError(f"plan.{name}={get(f'plan.{name}')} must be above 0 and at most 1.")
    if not 0 <= config.gate.max_regression <= 1:
        raise ConfigError(
            f"gate.max_regression={config.gate.max_regression} must be from 0 to 1: 0.05 lets a challenger be 5 % "
            "slower than the champion."
        )
    if config.parity.max_new_tokens < 3:
        raise ConfigError(
            f"parity.max_new_tokens={config.parity.max_new_tokens} must be 3 or more: the draft proposes nothing in "
            "shorter answers, so that there is nothing to compare."
        )
    if not 0 < config.engine.threshold <= 1:
        raise ConfigError(f"engine.threshold={config.engine.threshold} must be above 0 and at most 1.")
    for name in ("step_cost", "trace"):
        place = getattr(config.engine, name)
        if place and not Path(place).is_absolute():
            raise ConfigError(
                f"engine.{name}={place!r} is relative to a working directory that differs between processes. Use an "
                f"absolute path: {str(Path(place).absolute())!r}."
            )
    if not re.fullmatch(r"/|(/[^/{}?#\s]+)+", config.serving.route_prefix):
        raise ConfigError(
            f"serving.route_prefix={config.serving.route_prefix!r} must be / or begin with one and not end with one, "
            "as in /draftline."
        )
    # Of a registered model MLflow refuses only `/` and `:`, but the drafts behind its versions go by the same name.
    if (name := config.tracking.model_name) and (not name.strip() or set(name) & set("/:.%\"'")):
        raise ConfigError(
            f"tracking.model_name={name!r} must not be blank or have one of / : . % \" ' in it, which MLflow refuses; "
            "use - instead, or leave it empty for a name of target and draft."
        )
    if not config.serving.app_name:
        raise ConfigError("serving.app_name is empty; Ray Serve wants a name for the application.")
    if config.engine.rule == "ratio" and config.engine.scheduler == "global":
        raise ConfigError(
            "engine.rule=ratio with engine.scheduler=global would not follow the target's distribution when sampling; "
            "use engine.scheduler=asynchronous or early_stop, or engine.rule=coupled."
        )
    if config.deepspeed:
        zero_stage(config.deepspeed)
    trainer = config.trainer
    if trainer.sequences_per_step % (trainer.workers * trainer.accumulate):
        raise ConfigError(
            f"trainer.sequences_per_step={trainer.sequences_per_step} must be a multiple of "
            f"trainer.workers={trainer.workers} times trainer.accumulate={trainer.accumulate}, so that every worker "
            "trains on as many."
        )
    if not 0 <= trainer.ema < 1:
        raise ConfigError(f"trainer.ema={trainer.ema} must be at least 0 and below 1 (0 turns it off).")
    for name in ("ce", "kl", "reverse_kl", "tv", "lk", "lk_hybrid", "lk_eta", "confidence"):
        if not getattr(trainer, name) >= 0:
            raise ConfigError(f"trainer.{name}={getattr(trainer, name)} must be at least 0.")
    if not 0 < trainer.survival_floor <= 1:
        raise ConfigError(f"trainer.survival_floor={trainer.survival_floor} must be above 0 and at most 1.")
    if not 0 <= trainer.survival_memory < 1:
        raise ConfigError(f"trainer.survival_memory={trainer.survival_memory} must be at least 0 and below 1.")
    if config.trainer.warm_start.layers == "features":
        if config.features.mode == "stream":
            raise ConfigError(
                "trainer.warm_start.layers=features reads stored features, but features.mode=stream. Use "
                "features.mode=store, or trainer.warm_start.layers=target."
            )
        if config.draft.qk_norm:
            raise ConfigError(
                "trainer.warm_start.layers=features has no closed form for draft.qk_norm=true. Use "
                "draft.qk_norm=false, or trainer.warm_start.layers=target."
            )
