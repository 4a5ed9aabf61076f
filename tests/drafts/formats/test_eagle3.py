"""Eagle3 in the three projects' files: what comes back computes the same logits, and the names are theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.drafts.formats import deepspec, specforge, speculators
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.formats.samples import Damage, rounded, same_logits, settings, tensors

PLAIN: dict[str, Any] = {"algorithm": "eagle3", "num_layers": 1, "markov_head_type": "none"}
PLAIN |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
FIVE = {**PLAIN, "target_layer_ids": [0, 1, 2, 4, 5]}
OWN = {"own_embedding": True, "own_lm_head": True}
THREE = {**PLAIN, "target_layer_ids": [0, 2, 5], "qk_norm": False}


@pytest.fixture
def deep(tiny: Target) -> Target:
    """A target of six layers, of which five can be tapped."""
    config = copy.deepcopy(tiny.model.config)
    config.num_hidden_layers = 6
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 6
    torch.manual_seed(0)
    return Target(type(tiny.model)(config), tiny.tokenizer, tiny.identity)


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        (deepspec, FIVE),
        (speculators, THREE),
        (speculators, {**FIVE, "vocabulary": 60, "norm_before_residual": True}),
        (specforge, THREE),
        (specforge, {**THREE, "vocabulary": 60}),
        (deepspec, {**FIVE, **OWN}),
        (speculators, {**THREE, **OWN}),
        (specforge, {**THREE, "vocabulary": 60, "own_lm_head": True}),
    ],
    ids=[
        *("deepspec", "speculators, llama", "speculators, qwen3, reduced", "specforge", "specforge, reduced"),
        *("deepspec, own matrices", "speculators, own matrices", "specforge, reduced, own lm_head"),
    ],
)
def test_a_draft_computes_the_same_logits_after_the_round_trip(
    tmp_path: Path, deep: Target, format: ModuleType, kind: dict[str, Any]
) -> None:
    draft = rounded(deep, **kind)
    draft.temperatures.copy_(torch.linspace(0.5, 2.0, draft.config.tokens_per_block))
    format.write(draft, deep, tmp_path / "export", inputs={})
    again = format.read(tmp_path / "export", deep)
    same_logits(draft, again, deep)
    assert torch.equal(draft.temperatures, again.temperatures)
    for field in ("algorithm", "block_size", "target_layer_ids", "qk_norm", "norm_before_residual", *OWN):
        assert getattr(again.config, field) == getattr(draft.config, field), field


def test_deepspecs_files_are_what_its_tables_say(tmp_path: Path, deep: Target) -> None:
    draft = rounded(deep, **FIVE)
    deepspec.write(draft, deep, tmp_path / "export", inputs={})
    c = draft.config
    h, i, v, d = c.hidden_size, c.intermediate_size, deep.vocab_size, c.head_dim
    q, kv = c.num_heads * d, c.num_kv_heads * d
    held = load_file(tmp_path / "export" / "model.safetensors")
    assert {n: list(t.shape) for n, t in held.items()} == {
        "embed_tokens.weight": [v, h],
        "lm_head.weight": [v, h],
        "fc.weight": [h, 5 * h],
        "norm.weight": [h],
        "layers.0.hidden_norm.weight": [h],
        "layers.0.input_layernorm.weight": [h],
        "layers.0.post_attention_layernorm.weight": [h],
        "layers.0.self_attn.q_proj.weight": [q, 2 * h],
        "layers.0.self_attn.k_proj.weight": [kv, 2 * h],
        "layers.0.self_attn.v_proj.weight": [kv, 2 * h],
        "layers.0.self_attn.o_proj.weight": [h, q],
        "layers.0.self_attn.q_norm.weight": [d],
        "layers.0.self_attn.k_norm.weight": [d],
        "layers.0.mlp.gate_proj.weight": [i, h],
        "layers.0.mlp.up_proj.weight": [i, h],
        "layers.0.mlp.down_proj.weight": [h, i],
    }
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Eagle3Model"]
    assert (config["num_hidden_layers"], config["draft_num_hidden_layers"]) == (1, 1)
    assert (config["ttt_length"], config["step_loss_decay"]) == (c.block_size, 0.8)
    assert config["target_layer_ids"] == [0, 1, 2, 4, 5]


def test_specforges_files_are_what_sglang_reads(tmp_path: Path, deep: Target) -> None:
    draft = rounded(deep, **THREE, vocabulary=60)
    specforge.write(draft, deep, tmp_path / "export", inputs={})
    held = load_file(tmp_path / "export" / "model.safetensors")
    assert {n.split(".")[0] for n in held} == {"midlayer", "fc", "norm", "lm_head", "d2t", "t2d"}
    assert list(held["fc.weight"].shape) == [deep.hidden_size, 3 * deep.hidden_size]
    assert list(held["lm_head.weight"].shape) == [60, deep.hidden_size]
    # SGLang: hot_token_id = d2t + arange.
    assert torch.equal(held["d2t"] + torch.arange(60), draft.d2t)
    assert held["t2d"].dtype == torch.bool and int(held["t2d"].sum()) == 60
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["draft_vocab_size"] == 60 and config["tie_word_embeddings"] is False
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]


@pytest.mark.parametrize(
    ("format", "kind", "words"),
    [
        (deepspec, THREE, r"5 tapped layers; this draft has 3"),
        (deepspec, {**FIVE, "vocabulary": 60}, "draft.draft_vocab_size=0"),
        (deepspec, {**FIVE, "norm_before_residual": True}, "norm_before_residual=false"),
        (deepspec, {**FIVE, "qk_norm": False}, "draft.qk_norm=true"),
        (specforge, FIVE, r"draft.target_layer_ids=\[0,2,5\]"),
        (specforge, {**THREE, "qk_norm": True}, "draft.qk_norm=false"),
        (specforge, {**THREE, "norm_before_residual": True}, "norm_before_residual=false"),
        (specforge, {**THREE, **OWN}, "target's embed_tokens; .*draft.own_embedding=false"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_can(
    tmp_path: Path, deep: Target, format: ModuleType, kind: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        format.write(rounded(deep, **kind), deep, tmp_path / "export", inputs={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "kind", "damage", "words"),
    [
        (specforge, THREE, settings(num_hidden_layers=2), "has 2 layers"),
        (specforge, THREE, settings(model_type="phi3"), "model_type 'phi3'"),
        (specforge, THREE, settings(eagle_config=None), r"no eagle_config.eagle_aux_.*engines take \[1, 2, 2\]"),
        (specforge, THREE, tensors(lambda t: t.pop("midlayer.hidden_norm.weight")), "hidden_norm.weight is missing"),
        (specforge, THREE, tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
        (specforge, {**THREE, "vocabulary": 60}, tensors(lambda t: t["d2t"].add_(500)), "d2t leads to token"),
        (specforge, {**THREE, "vocabulary": 60}, tensors(lambda t: t["d2t"].sub_(500)), "d2t leads to token -"),
        (speculators, THREE, settings(eagle_aux_hidden_state_layer_ids=None), "no eagle_aux_hidden_state_layer_ids"),
        (speculators, THREE, settings(norm_output=True), "norm_output"),
        (speculators, THREE, settings("transformer_layer_config", mlp_bias=True), "mlp_bias"),
        (deepspec, FIVE, settings(target_layer_ids=[0, 1, 2, 4, 6]), "0 to 5"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path, deep: Target, format: ModuleType, kind: dict[str, Any], damage: Damage, words: str
) -> None:
    format.write(rounded(deep, **kind), deep, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        format.read(tmp_path / "export", deep)
