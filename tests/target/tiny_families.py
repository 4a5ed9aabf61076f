"""Tiny random targets of every family, with weights that matter: no gain is 1, no scalar is neutral, and greedy text
wanders instead of repeating a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from pipeline.target import Target, TargetIdentity

VOCABULARY = 96
WINDOW = 7
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
_GEMMA: dict[str, Any] = {**_SMALL, "sliding_window": WINDOW, "final_logit_softcapping": 0.5}
_GEMMA4: dict[str, Any] = {**_GEMMA, "global_head_dim": 16, "hidden_size_per_layer_input": 0}


def _gemma4(**changes: Any) -> Any:
    layers = changes.pop("num_hidden_layers", 3)
    settings = {**_GEMMA4, "num_hidden_layers": layers, "layer_types": _MIXED * (layers // 3), **changes}
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**settings))


def _gemma4_parts() -> Any:
    """The multimodal class, with per-layer inputs, as AutoModelForCausalLM loads it."""
    text = {**_GEMMA4, "num_hidden_layers": 3, "layer_types": _MIXED, "hidden_size_per_layer_input": 4}
    text |= {"vocab_size_per_layer_input": VOCABULARY, "use_bidirectional_attention": "vision"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    ids = {f"{n}_token_id": 90 + i for i, n in enumerate(("boi", "eoi", "image", "video", "boa", "audio"))}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, **ids)
    return transformers.Gemma4ForConditionalGeneration(config)


def _gemma3_parts() -> Any:
    text = {**_GEMMA, "num_hidden_layers": 3, "layer_types": _MIXED, "query_pre_attn_scalar": 5}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    return transformers.Gemma3ForConditionalGeneration(config)


def _deepseek_v4() -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "q_lora_rank": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 3,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "sliding_window": WINDOW,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 16,  # with few, scores tie at 0 and the choice among them is not causal
        "index_head_dim": 16,
        "index_topk": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**settings))


def _llama_like(model: str, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        settings = {**_SMALL, "num_hidden_layers": 3, **changes}
        return getattr(transformers, f"{model}ForCausalLM")(getattr(transformers, f"{model}Config")(**settings))

    return build


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama_like("Llama"),
    "mistral, sliding": _llama_like("Mistral", sliding_window=WINDOW),
    "qwen2, mixed windows": _llama_like("Qwen2", use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED),
    "qwen3": _llama_like("Qwen3"),
    "qwen3_moe": _llama_like("Qwen3Moe", **_MOE),
    "gemma2, both softcaps": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_GEMMA,
            num_hidden_layers=3,
            layer_types=_MIXED,
            attn_logit_softcapping=0.7,
            query_pre_attn_scalar=5,
            attn_implementation="eager",
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_GEMMA, num_hidden_layers=3, layer_types=_MIXED, query_pre_attn_scalar=5)
    ),
    "gemma4": _gemma4,
    "gemma4, keys are values": lambda **c: _gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, **c),
    "gemma4, shared keys": lambda: _gemma4(
        num_hidden_layers=6,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "gemma4, experts": lambda: _gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
    "gemma3, multimodal": _gemma3_parts,
    "gemma4, multimodal": _gemma4_parts,
    "gemma4_unified": lambda: transformers.Gemma4UnifiedForCausalLM(
        transformers.Gemma4UnifiedTextConfig(
            **{k: v for k, v in _GEMMA4.items() if "per_layer" not in k}, num_hidden_layers=3, layer_types=_MIXED
        )
    ),
    "deepseek_v4": _deepseek_v4,
}
ENGINE = [name for name in BUILDERS if name != "deepseek_v4"]


class _Tokenizer:
    """As much of a tokenizer as a Target asks for."""

    bos_token_id, eos_token_id = 2, 1
    all_special_ids = (0, 1, 2, 3)
    chat_template = None

    def __len__(self) -> int:
        return VOCABULARY

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def tiny_target(name: str, seed: int = 4, **changes: Any) -> Target:
    """A Target of a family, in fp32, its weights drawn from the seed alone; changes: of a Gemma 4's config."""
    model = BUILDERS[name](**changes)
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies embeddings by sqrt(32): smaller ones, or the token just read decides the next one.
    embedding, linear = (0.06, 0.5) if "gemma" in name else (0.35, 0.25)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            noise = torch.empty(weight.shape).normal_(generator=generator)
            if weight.dim() == 1:  # gains, sinks, biases
                weight.copy_(weight + 0.3 * noise)
            else:
                weight.copy_(noise * (embedding if "embed_tokens.weight" in key else linear))
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.5 + 0.5)
            if key.endswith("tid2eid"):
                buffer.copy_(torch.randint(0, 4, buffer.shape, generator=generator))
    return Target(model, _Tokenizer(), TargetIdentity(name, "r", "w", "c", "t"))
