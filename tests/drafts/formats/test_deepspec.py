"""DeepSpec checkpoints: what we write, its own tables describe; what comes back computes the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma4TextConfig

from pipeline.drafts.formats import deepspec
from pipeline.drafts.formats.engines import fit
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.formats.samples import rounded, same_logits, settings, tensors
from tests.drafts.samples import small_draft
from tests.target.tiny_families import tiny_target

EAGLE3 = {
    **{"algorithm": "eagle3", "num_layers": 1, "markov_head_type": "none", "enable_confidence_head": False},
    "target_layer_ids": [0, 1, 2, 3, 4],
}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False},
    "own matrices": {"own_embedding": True, "own_lm_head": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_computes_the_same_logits_after_the_round_trip(tmp_path: Path, tiny: Target, kind: str) -> None:
    draft = rounded(tiny, **KINDS[kind])
    draft.temperatures.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    deepspec.write(draft, tiny, tmp_path / "export", inputs={})
    again = deepspec.read(tmp_path / "export", tiny)
    same_logits(draft, again, tiny)
    assert torch.equal(draft.temperatures, again.temperatures)
    for field in ("algorithm", "own_embedding", "own_lm_head"):
        assert getattr(again.config, field) == getattr(draft.config, field), field


@pytest.mark.parametrize("target", ["gemma4", "gemma4, keys are values"])
@pytest.mark.parametrize("kind", [*KINDS, "eagle3"])
def test_a_draft_with_gemma_4_s_layers_makes_the_round_trip(tmp_path: Path, kind: str, target: str) -> None:
    loaded = tiny_target(target, num_hidden_layers=6)
    draft = rounded(loaded, layer_family="gemma4", **(EAGLE3 if kind == "eagle3" else KINDS[kind]))
    for layer in draft.layers:
        layer.layer_scalar.fill_(0.75)
    deepspec.write(draft, loaded, tmp_path / "export", inputs={})
    again = deepspec.read(tmp_path / "export", loaded)
    same_logits(draft, again, loaded)
    shape = ["algorithm", "layer_family", "num_heads", "num_kv_heads", "head_dim", "rope_fraction", "values_are_keys"]
    assert [getattr(again.config, n) for n in shape] == [getattr(draft.config, n) for n in shape]


def test_the_files_of_gemma_4_are_what_the_tables_say(tmp_path: Path) -> None:
    """The Qwen3 names, two more norms and a scalar per layer, and no v_proj where keys are values; transformers reads
    the config."""
    target = tiny_target("gemma4, keys are values")
    draft = rounded(target, layer_family="gemma4")
    deepspec.write(draft, target, tmp_path / "export", inputs={})
    written = load_file(tmp_path / "export" / "model.safetensors")
    h, d = target.hidden_size, draft.config.head_dim
    of_layer = {n.removeprefix("layers.1."): list(t.shape) for n, t in written.items() if n.startswith("layers.1.")}
    assert of_layer == {
        "self_attn.q_proj.weight": [4 * d, h],
        "self_attn.k_proj.weight": [d, h],
        "self_attn.o_proj.weight": [h, 4 * d],
        "self_attn.q_norm.weight": [d],
        "self_attn.k_norm.weight": [d],
        "mlp.gate_proj.weight": [48, h],
        "mlp.up_proj.weight": [48, h],
        "mlp.down_proj.weight": [h, 48],
        "input_layernorm.weight": [h],
        "post_attention_layernorm.weight": [h],
        "pre_feedforward_layernorm.weight": [h],
        "post_feedforward_layernorm.weight": [h],
        "layer_scalar": [1],
    }
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["Gemma4DSparkModel"]
    read = Gemma4TextConfig(**config)
    assert read.per_layer_config[0].head_dim == d
    assert read.attention_k_eq_v
    assert read.num_hidden_layers == draft.config.num_layers
    assert read.final_logit_softcapping == target.family.logit_softcap
    assert set(read.layer_types) == {"full_attention"}
    assert fit(draft, "vllm", "deepspec").loads and fit(draft, "sglang", "deepspec").loads
    told = str(fit(draft, "vllm"))
    assert "export.engine=vllm export.format=deepspec" in told, told


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (settings(hidden_activation="silu"), "hidden_activation is 'silu'"),
        (settings(final_logit_softcapping=3.0), "final_logit_softcapping is 3.0, the target's is 0.5"),
        (settings(enable_moe_block=True), "enable_moe_block is True"),
        (settings(global_head_dim=None), "no global_head_dim"),
        (settings(layer_types=["sliding_attention"]), "full attention only"),
        (settings(attention_k_eq_v=False), "v_proj.weight is missing"),
        (tensors(lambda t: t.pop("layers.0.layer_scalar")), "layers.0.layer_scalar is missing"),
    ],
)
def test_a_gemma_4_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    target = tiny_target("gemma4, keys are values")
    deepspec.write(rounded(target, layer_family="gemma4"), target, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        deepspec.read(tmp_path / "export", target)


def test_the_files_are_what_the_tables_say(tmp_path: Path, tiny: Target) -> None:
    """Names and shapes of DeepSpec's Qwen3 DSpark: H hidden, I mlp, V vocabulary, r rank, d head dim."""
    draft = rounded(tiny)
    deepspec.write(draft, tiny, tmp_path / "export", inputs={})
    c = draft.config
    h, i, v, r = c.hidden_size, c.intermediate_size, tiny.vocab_size, c.markov_rank
    q, kv, d = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.head_dim
    wanted = {
        "embed_tokens.weight": [v, h],
        "lm_head.weight": [v, h],
        "fc.weight": [h, 2 * h],
        "hidden_norm.weight": [h],
        "norm.weight": [h],
        "markov_head.markov_w1.weight": [v, r],
        "markov_head.markov_w2.weight": [v, r],
        "confidence_head.proj.weight": [1, h + r],
        "confidence_head.proj.bias": [1],
    }
    for n in range(c.num_layers):
        wanted |= {
            f"layers.{n}.self_attn.q_proj.weight": [q, h],
            f"layers.{n}.self_attn.k_proj.weight": [kv, h],
            f"layers.{n}.self_attn.v_proj.weight": [kv, h],
            f"layers.{n}.self_attn.o_proj.weight": [h, q],
            f"layers.{n}.self_attn.q_norm.weight": [d],
            f"layers.{n}.self_attn.k_norm.weight": [d],
            f"layers.{n}.mlp.gate_proj.weight": [i, h],
            f"layers.{n}.mlp.up_proj.weight": [i, h],
            f"layers.{n}.mlp.down_proj.weight": [h, i],
            f"layers.{n}.input_layernorm.weight": [h],
            f"layers.{n}.post_attention_layernorm.weight": [h],
        }
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert {n: list(t.shape) for n, t in written.items()} == wanted
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["target_layer_ids"] == [0, 2] and config["num_target_layers"] == tiny.num_layers
    assert (config["markov_head_type"], config["markov_rank"]) == ("vanilla", r)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": 60}, "draft_vocab_size=0"),
        ({"qk_norm": False}, "qk_norm=true"),
        ({"sample_from_anchor": False}, "sample_from_anchor=true"),
        ({"sliding_windows": [0, 9]}, r"sliding_windows=\[\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_what_can(
    tmp_path: Path,
    tiny: Target,
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        deepspec.write(small_draft(tiny, **{"vocabulary": 0, **changes}), tiny, tmp_path / "export", inputs={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors(lambda t: t.pop("norm.weight")), "norm.weight is missing"),
        (tensors(lambda t: t.update(extra=torch.ones(1))), "extra is unknown"),
        (tensors(lambda t: t.update({"fc.weight": torch.ones(3, 3)})), r"fc.weight has shape \[3, 3\]"),
        (tensors(lambda t: t["fc.weight"].fill_(float("nan"))), "not finite"),
        (settings(architectures=["Gemma3DSparkModel"]), "Gemma3DSparkModel"),
        (settings(target_layer_ids=[0, 4]), "0 to 3"),
        (settings(mask_token_id=9999), "mask_token_id=9999"),
        (settings(block_size=None), "no block_size"),
        (settings(layer_types=["sliding_attention"]), "full attention only"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path,
    tiny: Target,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    deepspec.write(rounded(tiny), tiny, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        deepspec.read(tmp_path / "export", tiny)
