"""What a draft is: its architecture, in plain values that travel in its checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """A draft (DSpark, DFlash, Eagle3). Zeros, empty lists and -1 mean "as the target" and are filled by `resolve`.

    Attributes:
        algorithm: dspark, dflash or eagle3 (the last two without Markov and confidence head).
        block_size: K slots; of eagle3 the tokens that a block proposes and that training unrolls.
        sample_from_anchor: whether the anchor's slot predicts too (see pipeline/drafts/dspark.py).
        num_layers: draft layers. target_layer_ids: tapped target layers, 0-based.
        hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, rope_theta, rms_norm_eps: of the draft's
            layers; hidden_size must be the target's, whose states are read and whose embedding and lm_head are borrowed
            or copied.
        layer_family: llama (qwen3's with qk_norm) or gemma4: what the layers compute (see pipeline/drafts/layers.py).
            gemma4's take heads, KV heads and head dim of the target's layers with full attention.
        qk_norm: RMSNorm on queries and keys.
        rope_fraction: gemma4: share of a head that rotates. values_are_keys: gemma4: no projection for values. None:
            as the target's layers with full attention; without meaning in llama's.
        sliding_windows: per layer, how many positions back a slot sees context (0: all); empty: all of it everywhere.
        mask_token_id: fills slots 1..K-1; must be an embedding row that no text uses.
        norm_before_residual: eagle3: its residual stream starts at the normalised g, not at g.
        markov_rank: r of the Markov head. markov_head_type: none, vanilla, gated or rnn.
        enable_confidence_head, confidence_head_with_markov: the confidence head and whether it sees the Markov
            embedding of the token before.
        draft_vocab_size: Vd, most frequent tokens of the corpus (0: the target's whole vocabulary).
        own_embedding, own_lm_head: weights of the draft's own, which start as the target's and are trained, instead of
            the target's (of lm_head the rows of the draft vocabulary).
    """

    algorithm: str = "dspark"
    block_size: int = 7
    num_layers: int = 2
    target_layer_ids: list[int] = dataclasses.field(default_factory=list)
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    rope_theta: float = 0.0
    rms_norm_eps: float = 0.0
    layer_family: str = "llama"
    qk_norm: bool = True
    rope_fraction: float | None = None
    values_are_keys: bool | None = None
    sliding_windows: list[int] = dataclasses.field(default_factory=list)
    sample_from_anchor: bool = True
    norm_before_residual: bool = False
    mask_token_id: int = -1
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    draft_vocab_size: int = 0
    own_embedding: bool = False
    own_lm_head: bool = False

    @property
    def has_markov(self) -> bool:
        return self.markov_head_type != "none" and self.markov_rank > 0

    @property
    def tokens_per_block(self) -> int:
        """G: how many tokens a block proposes."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    def window(self, layer: int) -> int:
        """Positions back that a layer's slots see, their own included; 0 for all."""
        return self.sliding_windows[layer] if self.sliding_windows else 0


def default_layer_ids(num_layers: int, count: int = 5) -> list[int]:
    """Evenly spaced layers from 1 to n-3 (36 layers: [1, 9, 17, 25, 33])."""
    last = max(1, num_layers - 3)
    count = min(count, last)
    if count == 1:
        return [last]
    return sorted({round(1 + i * (last - 1) / (count - 1)) for i in range(count)})


def tapping(config: DraftConfig, given: list[int], where: str) -> DraftConfig:
    """The draft with the layers that its features come from, which are the ones that it will tap.

    Args:
        where: what has the layers `given`, as the message calls it.
    Raises:
        ConfigError: the draft wants others.
    """
    wanted = list(config.target_layer_ids)
    if wanted and wanted != given:
        raise ConfigError(
            f"draft.target_layer_ids={wanted}, but {where} has {given}. Extract the draft's layers, or train a "
            "draft of those."
        )
    return dataclasses.replace(config, target_layer_ids=given)


def rope_theta_of(target_config: Any) -> float:
    """Base of a draft's rotary embedding, where its config leaves it open.

    A draft rotates all of a head, by the plain formula. Targets with one embedding lend its base, whatever they make of
    it at long range; of those with several (Gemma by layer type, DeepSeek-V4 by branch) it is the base of the layers
    that rotate by the plain formula too, full attention before sliding windows, else of the first.
    """
    rope = getattr(target_config, "rope_parameters", None) or {}
    if any(isinstance(part, dict) for part in rope.values()):
        order = ("full_attention", "main", "sliding_attention")
        parts = [rope[name] for name in order if rope.get(name)] or [p for p in rope.values() if p]
        rope = next((p for p in parts if p.get("rope_type", "default") == "default"), parts[0])
    return float(rope.get("rope_theta", 1e4))


def _attention_of(target_config: Any, config: DraftConfig) -> tuple[int, int, int]:
    """Heads, KV heads and head dim of the target's first layer, for what the draft's config leaves open."""
    if getattr(target_config, "model_type", "") == "deepseek_v4":
        names = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        if missing := [f"draft.{n}" for n in names if not getattr(config, n)]:
            raise ConfigError(
                f"{', '.join(missing)} must be set for a deepseek_v4 target: its {target_config.num_attention_heads} "
                f"heads of {target_config.head_dim} share one key over compressed context and its MLPs are experts, so "
                "there is no size for a draft's plain layers to take over. For hidden_size 4096 a usual shape is "
                "num_heads 32, num_kv_heads 8, head_dim 128, intermediate_size 12288."
            )
        return config.num_heads, config.num_kv_heads, config.head_dim
    per_layer = getattr(target_config, "per_layer_config", None)  # Gemma 4's layer types differ
    if config.layer_family == "gemma4":
        full = _full_attention(target_config)
        return full.num_attention_heads, full.num_key_value_heads, full.head_dim
    first = per_layer[0] if per_layer is not None else target_config
    heads = first.num_attention_heads
    kv_heads = getattr(first, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(first, "head_dim", None) or first.hidden_size // heads


def _full_attention(target_config: Any) -> Any:
    """The config of a Gemma 4 target's layers with full attention."""
    kinds, per_layer = getattr(target_config, "layer_types", None), getattr(target_config, "per_layer_config", None)
    if per_layer is None or not kinds or not hasattr(target_config, "attention_k_eq_v"):
        raise ConfigError(
            f"draft.layer_family=gemma4 takes its shape from a Gemma 4 target; this one is a "
            f"{getattr(target_config, 'model_type', 'model')}. Use draft.layer_family=llama."
        )
    return per_layer[kinds.index("full_attention") if "full_attention" in kinds else 0]


def _as_full_attention(config: DraftConfig, target_config: Any) -> DraftConfig:
    """Fills rotary embedding and shared values from a Gemma 4 target's layers with full attention."""
    rope = target_config.rope_parameters["full_attention"]
    fraction, shared = config.rope_fraction, config.values_are_keys
    return dataclasses.replace(
        config,
        rope_theta=config.rope_theta or float(rope["rope_theta"]),
        rope_fraction=float(rope.get("partial_rotary_factor", 1.0)) if fraction is None else fraction,
        values_are_keys=bool(target_config.attention_k_eq_v) if shared is None else shared,
    )


def resolve(config: DraftConfig, target_config: Any, unused_token: int) -> DraftConfig:
    """Fills what the config leaves to the target.

    Args:
        target_config: the target's transformers text config.
        unused_token: an embedding row that no text uses, for `mask_token_id` -1.
    Raises:
        ConfigError: values that can't fit the target.
    """
    heads, kv_heads, head_dim = _attention_of(target_config, config)
    if config.layer_family == "gemma4":
        config = _as_full_attention(config, target_config)
    full = dataclasses.replace(
        config,
        hidden_size=config.hidden_size or target_config.hidden_size,
        num_heads=config.num_heads or heads,
        num_kv_heads=config.num_kv_heads or kv_heads,
        head_dim=config.head_dim or head_dim,
        intermediate_size=config.intermediate_size or target_config.intermediate_size,
        rope_theta=config.rope_theta or rope_theta_of(target_config),
        rms_norm_eps=config.rms_norm_eps or target_config.rms_norm_eps,
        target_layer_ids=config.target_layer_ids or default_layer_ids(target_config.num_hidden_layers),
        mask_token_id=config.mask_token_id if config.mask_token_id >= 0 else unused_token,
    )
    check(full, target_config.hidden_size, target_config.vocab_size, target_config.num_hidden_layers)
    return full


def check(config: DraftConfig, hidden_size: int, vocab_rows: int, num_layers: int) -> None:
    """Raises ConfigError naming the field of a resolved config that can't work with such a target."""
    from pipeline.target.taps import validate_layer_ids  # brings transformers, which composing a config does without

    for name in ("block_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"draft.{name}={getattr(config, name)} must be at least 1.")
    if config.head_dim % 2:
        raise ConfigError(f"draft.head_dim={config.head_dim} must be even, for rotary embeddings.")
    if config.markov_rank < 0:
        raise ConfigError(f"draft.markov_rank={config.markov_rank} must be 0 (no Markov head) or more.")
    if config.hidden_size != hidden_size:
        raise ConfigError(
            f"draft.hidden_size={config.hidden_size}, but the target's embedding, which the draft takes over, has "
            f"{hidden_size}. Leave it 0."
        )
    if not 0 <= config.mask_token_id < vocab_rows:
        raise ConfigError(f"draft.mask_token_id={config.mask_token_id} is outside the {vocab_rows} embedding rows.")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"draft.num_heads={config.num_heads} must be a multiple of {config.num_kv_heads} KV heads.")
    if not 0 <= config.draft_vocab_size <= vocab_rows:
        raise ConfigError(
            f"draft.draft_vocab_size={config.draft_vocab_size} is not from 0 (all) to the target's {vocab_rows} tokens."
        )
    if config.tokens_per_block < 1:
        raise ConfigError("draft.block_size=1 with draft.sample_from_anchor=false proposes nothing; use 2 or more.")
    if config.algorithm != "dspark" and (config.has_markov or config.enable_confidence_head):
        raise ConfigError(
            f"draft.algorithm={config.algorithm} has neither head: set draft.markov_head_type=none and "
            "draft.enable_confidence_head=false, or use draft.algorithm=dspark."
        )
    if config.algorithm == "eagle3":
        for name, only in (("num_layers", 1), ("sample_from_anchor", True), ("sliding_windows", [])):
            if getattr(config, name) != only:
                raise ConfigError(
                    f"draft.{name}={getattr(config, name)!r}: draft.algorithm=eagle3 takes {only!r} only."
                )
    if config.layer_family not in ("llama", "gemma4"):
        raise ConfigError(f"draft.layer_family={config.layer_family!r} is not one of llama, gemma4.")
    if config.layer_family == "gemma4":
        if not config.qk_norm:
            raise ConfigError("draft.qk_norm=false: draft.layer_family=gemma4 normalises queries and keys; use true.")
        if not 0.0 < (1.0 if config.rope_fraction is None else config.rope_fraction) <= 1.0:
            raise ConfigError(f"draft.rope_fraction={config.rope_fraction} must be above 0 and at most 1.")
    elif config.rope_fraction not in (None, 1.0) or config.values_are_keys:
        raise ConfigError(
            f"draft.rope_fraction={config.rope_fraction} and draft.values_are_keys={config.values_are_keys} are for "
            "draft.layer_family=gemma4; leave them null."
        )
    if config.sliding_windows and len(config.sliding_windows) != config.num_layers:
        raise ConfigError(
            f"draft.sliding_windows={config.sliding_windows} has {len(config.sliding_windows)} entries; the draft has "
            f"{config.num_layers} layers. Give one per layer (0: no window)."
        )
    if any(0 < w <= config.block_size or w < 0 for w in config.sliding_windows):
        raise ConfigError(
            f"draft.sliding_windows={config.sliding_windows}: a window must be above the block of {config.block_size} "
            "slots, or 0 for none."
        )
    validate_layer_ids(config.target_layer_ids, num_layers)
