"""Draft layers of the Gemma 4 kind compute what transformers' own layer of full attention computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.layers import DecoderLayer
from pipeline.errors import ConfigError
from pipeline.target import Target
from tests.drafts.samples import small_draft
from tests.target.tiny_families import tiny_target

FULL = 2  # the tiny target's layer of full attention
TARGETS = ["gemma4", "gemma4, keys are values"]


def _layer(target: Target) -> tuple[DecoderLayer, Any]:
    """Our layer with the weights of the target's."""
    theirs = target.family.layers[FULL]
    draft = small_draft(target, layer_family="gemma4", num_layers=1)
    ours = draft.decoder_layers[0]
    given = theirs.state_dict()
    assert set(ours.state_dict()) == set(given)  # names and the absence of v_proj are theirs
    ours.load_state_dict(given)
    return ours, draft


@pytest.mark.parametrize("partial", [1.0, 0.25])
@pytest.mark.parametrize("name", TARGETS)
def test_a_layer_computes_what_transformers_computes(name: str, partial: float) -> None:
    target = tiny_target(name)
    rope = target.config.rope_parameters
    rope["full_attention"] = {**rope["full_attention"], "partial_rotary_factor": partial}
    target.family.backbone.rotary_emb.__init__(target.config)  # takes the changed share
    ours, draft = _layer(target)
    assert draft.config.rope_fraction == partial
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3, 12)
    with torch.no_grad():
        cos, sin = target.family.backbone.rotary_emb(x[None], positions[None], "full_attention")
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        theirs = target.family.layers[FULL](
            x[None], position_embeddings=(cos, sin), attention_mask=mask, shared_kv_states={}
        )[0]
        turned = draft.rope(positions)
        h = ours.input_layernorm(x)
        q, (k, v) = ours.self_attn.queries(h, *turned), ours.self_attn.keys_values(h, *turned)
        mixed = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        mine = ours.finish(x, mixed[0].transpose(0, 1))
    torch.testing.assert_close(mine, theirs.view_as(mine), rtol=1e-5, atol=1e-5)
    assert float((mine - x).std()) > 0.1


def test_a_gemma_layer_takes_its_shape_from_the_target_s_full_attention() -> None:
    target = tiny_target("gemma4, keys are values")
    config = resolve(DraftConfig(target_layer_ids=[1], layer_family="gemma4"), target.config, target.unused_token)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 16)
    assert config.values_are_keys
    assert config.rope_theta == target.config.rope_parameters["full_attention"]["rope_theta"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"layer_family": "gemma4"}, "Use draft.layer_family=llama"),
        ("gemma3", {"layer_family": "gemma4"}, "Use draft.layer_family=llama"),
        ("gemma4", {"layer_family": "gemma4", "qk_norm": False}, "draft.qk_norm=false"),
        ("gemma4", {"layer_family": "gemma4", "rope_fraction": 1.5}, "draft.rope_fraction=1.5"),
        ("gemma4", {"layer_family": "gemma"}, "'gemma' is not one of llama, gemma4"),
        ("llama", {"values_are_keys": True}, "draft.values_are_keys=True"),
    ],
)
def test_a_shape_that_cannot_be_says_which_setting(name: str, changes: dict[str, Any], words: str) -> None:
    target = tiny_target(name)
    with pytest.raises(ConfigError, match=words):
        resolve(DraftConfig(target_layer_ids=[1], **changes), target.config, target.unused_token)
