"""speculators' checkpoints: what we write, its own tables describe; what comes back computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.drafts.formats import speculators
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.formats.samples import Damage, rounded, same_logits, settings, tensors

PLAIN = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "reduced vocabulary": {"vocabulary": 60},
    "silent anchor": {"sample_from_anchor": False},
    "no heads": {"markov_head_type": "none", "enable_confidence_head": False},
    "hidden confidence": {"confidence_head_with_markov": False},
    "one sliding layer": {"sliding_windows": [9, 0]},
    "dflash": {**PLAIN, "sample_from_anchor": False},
    "dflash, DeepSpec's slots, reduced vocabulary": {**PLAIN, "vocabulary": 60},
    "own matrices": {"own_embedding": True, "own_lm_head": True},
    "own lm_head, reduced vocabulary": {"own_lm_head": True, "vocabulary": 60},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_computes_the_same_logits_after_the_round_trip(tmp_path: Path, tiny: Target, kind: str) -> None:
    draft = rounded(tiny, **KINDS[kind])
    draft.temperatures.copy_(torch.linspace(0.5, 2.0, draft.config.tokens_per_block))
    speculators.write(draft, tiny, tmp_path / "export", inputs={})
    again = speculators.read(tmp_path / "export", tiny)
    same_logits(draft, again, tiny)
    assert torch.equal(draft.temperatures, again.temperatures)
    shared = ("algorithm", "sample_from_anchor", "target_layer_ids", "sliding_windows", "mask_token_id")
    for field in (*shared, "own_embedding", "own_lm_head"):
        assert getattr(again.config, field) == getattr(draft.config, field), field


def test_the_files_are_what_the_tables_say(tmp_path: Path, tiny: Target) -> None:
    """Of a reduced vocabulary: ids L + 1, offsets in d2t, a mask in t2d, lm_head and W2 over the draft vocabulary."""
    draft = rounded(tiny, vocabulary=60)
    speculators.write(draft, tiny, tmp_path / "export", inputs={}, served_target="org/tiny")
    held = load_file(tmp_path / "export" / "model.safetensors")
    c, v = draft.config, tiny.vocab_size
    assert "embed_tokens.weight" not in held
    assert list(held["lm_head.weight"].shape) == [60, c.hidden_size]
    assert list(held["markov_head.markov_w2.weight"].shape) == [60, c.markov_rank]
    assert list(held["markov_head.markov_w1.weight"].shape) == [v, c.markov_rank]
    assert held["d2t"].dtype == torch.int64 and held["t2d"].dtype == torch.bool
    assert [d + int(o) for d, o in enumerate(held["d2t"])] == draft.d2t.tolist()
    assert held["t2d"].nonzero().flatten().tolist() == draft.d2t.tolist() and len(held["t2d"]) == v
    assert {t.dtype for n, t in held.items() if n not in ("d2t", "t2d")} == {torch.bfloat16}

    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["DSparkSpeculator"] and config["speculators_model_type"] == "dspark"
    assert draft.config.target_layer_ids == [0, 2] and config["aux_hidden_state_layer_ids"] == [1, 3]
    assert (config["draft_vocab_size"], config["block_size"], config["sample_from_anchor"]) == (60, 4, True)
    assert (config["markov_head_type"], config["markov_rank"]) == ("vanilla", 6)
    made = config["speculators_config"]
    assert made["algorithm"] == "dspark" and made["proposal_methods"][0]["speculative_tokens"] == 4
    assert made["verifier"] == {"name_or_path": "org/tiny", "architectures": ["LlamaForCausalLM"]}
    layers = config["transformer_layer_config"]
    assert (layers["num_hidden_layers"], layers["vocab_size"], layers["model_type"]) == (2, v, "qwen3")


def test_a_silent_anchor_proposes_one_token_less(tmp_path: Path, tiny: Target) -> None:
    speculators.write(rounded(tiny, **KINDS["dflash"]), tiny, tmp_path / "export", inputs={})
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["sample_from_anchor"] is False and "markov_rank" not in config
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": False}, "draft.qk_norm=true"),
        ({"sliding_windows": [9, 12]}, r"draft.sliding_windows=\[12,12\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_what_can(
    tmp_path: Path,
    tiny: Target,
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        speculators.write(rounded(tiny, **changes), tiny, tmp_path / "export", inputs={})
    assert not list(tmp_path.iterdir())


def swap(held: dict[str, torch.Tensor]) -> None:
    held["t2d"] = held["t2d"].roll(1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors(lambda t: t.pop("norm.weight")), "norm.weight is missing"),
        (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
        (tensors(lambda t: t.pop("d2t")), "d2t is missing"),
        (tensors(lambda t: t["d2t"].add_(400)), "the target has 384"),
        (tensors(lambda t: t["d2t"][:2].copy_(torch.tensor([30, 2]))), "ascending"),
        (tensors(swap), "t2d marks other tokens"),
        (tensors(lambda t: t.update(extra=torch.ones(1))), "extra is unknown"),
        (tensors(lambda t: t.update({"fc.weight": torch.ones(3, 3)})), r"fc.weight has shape \[3, 3\]"),
        (tensors(lambda t: t["fc.weight"].fill_(float("nan"))), "not finite"),
        (settings(speculators_model_type="medusa"), "'medusa'; this reads dspark and dflash and eagle3"),
        (settings(aux_hidden_state_layer_ids=[1, 5]), "0 to 3"),
        (settings(aux_hidden_state_layer_ids=[0, 1]), "-1"),
        (settings(aux_hidden_state_layer_ids=None), "no aux_hidden_state_layer_ids"),
        (tensors(lambda t: t["d2t"].sub_(400)), "leads to token -"),
        (settings(mask_token_id=9999), "mask_token_id=9999 is outside the 384 embedding rows"),
        (settings(draft_vocab_size=61), r"d2t has shape \[60\], the config gives \[61\]"),
        (settings(sample_from_anchor=False), "temperatures.json must hold 3 numbers"),
        (settings("transformer_layer_config", vocab_size=400), "vocab_size is 400, the target's is 384"),
        (settings("transformer_layer_config", hidden_size=65), "hidden_size=65"),
        (settings("transformer_layer_config", attention_bias=True), "attention_bias is True"),
        (settings("transformer_layer_config", rms_norm_eps=None), "no rms_norm_eps"),
        (settings("transformer_layer_config", rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path,
    tiny: Target,
    damage: Damage,
    words: str,
) -> None:
    speculators.write(rounded(tiny, vocabulary=60), tiny, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        speculators.read(tmp_path / "export", tiny)


def test_causal_sliding_layers_are_not_read_as_ours(tmp_path: Path, tiny: Target) -> None:
    speculators.write(rounded(tiny, sliding_windows=[0, 9]), tiny, tmp_path / "export", inputs={})
    settings(sliding_window_non_causal=False)(tmp_path / "export")
    with pytest.raises(ArtifactError, match="sliding_window_non_causal=false"):
        speculators.read(tmp_path / "export", tiny)


def test_every_difference_is_told_at_once(tmp_path: Path, tiny: Target) -> None:
    speculators.write(rounded(tiny), tiny, tmp_path / "export", inputs={})
    settings("transformer_layer_config", vocab_size=400, hidden_act="gelu")(tmp_path / "export")
    settings(mask_token_id=9999)(tmp_path / "export")
    with pytest.raises(ArtifactError) as error:
        speculators.read(tmp_path / "export", tiny)
    for words in ("vocab_size is 400", "hidden_act is 'gelu'", "mask_token_id=9999"):
        assert words in str(error.value)
