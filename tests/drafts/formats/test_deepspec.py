"""DeepSpec checkpoints: what we write, its own tables describe; what comes back computes the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.drafts.formats import deepspec
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.conftest import cache_dir, tiny  # noqa: F401
from tests.drafts.formats.samples import rounded, same_logits, settings, tensors
from tests.drafts.samples import small_draft

KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_computes_the_same_logits_after_the_round_trip(tmp_path: Path, tiny: Target, kind: str) -> None:  # noqa: F811
    draft = rounded(tiny, **KINDS[kind])
    draft.temperatures.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    deepspec.write(draft, tiny, tmp_path / "export", inputs={})
    again = deepspec.read(tmp_path / "export", tiny)
    same_logits(draft, again, tiny)
    assert torch.equal(draft.temperatures, again.temperatures)
    assert again.config.algorithm == draft.config.algorithm


def test_the_files_are_what_the_tables_say(tmp_path: Path, tiny: Target) -> None:  # noqa: F811
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
    tiny: Target,  # noqa: F811
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
        (tensors(lambda t: t["lm_head.weight"].add_(1)), "lm_head.weight is not the target's"),
        (tensors(lambda t: t["fc.weight"].fill_(float("nan"))), "not finite"),
        (settings(architectures=["Gemma4DSparkModel"]), "Gemma4DSparkModel"),
        (settings(target_layer_ids=[0, 4]), "0 to 3"),
        (settings(mask_token_id=9999), "mask_token_id=9999"),
        (settings(block_size=None), "no block_size"),
        (settings(layer_types=["sliding_attention"]), "full attention only"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path,
    tiny: Target,  # noqa: F811
    damage: Callable[[Path], None],
    words: str,
) -> None:
    deepspec.write(rounded(tiny), tiny, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        deepspec.read(tmp_path / "export", tiny)
