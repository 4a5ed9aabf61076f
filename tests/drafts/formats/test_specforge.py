"""SpecForge's checkpoints, as SGLang reads them; what comes back computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.drafts.formats import specforge
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.formats.samples import Damage, rounded, same_logits, settings, tensors

PLAIN = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no confidence": {"enable_confidence_head": False},
    "sliding layers": {"sliding_windows": [9, 9]},
    "dflash": {**PLAIN, "sample_from_anchor": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_computes_the_same_logits_after_the_round_trip(tmp_path: Path, tiny: Target, kind: str) -> None:
    draft = rounded(tiny, **KINDS[kind])
    draft.temperatures.copy_(torch.linspace(0.5, 2.0, draft.config.tokens_per_block))
    specforge.write(draft, tiny, tmp_path / "export", inputs={})
    again = specforge.read(tmp_path / "export", tiny)
    same_logits(draft, again, tiny)
    assert torch.equal(draft.temperatures, again.temperatures)
    for field in ("algorithm", "sample_from_anchor", "target_layer_ids", "sliding_windows", "mask_token_id"):
        assert getattr(again.config, field) == getattr(draft.config, field), field


def test_the_files_are_what_the_tables_say(tmp_path: Path, tiny: Target) -> None:
    draft = rounded(tiny)
    draft.temperatures.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    specforge.write(draft, tiny, tmp_path / "export", inputs={})
    held = load_file(tmp_path / "export" / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight", "d2t", "t2d"} & held.keys()
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    assert list(held["markov_head.markov_w2.weight"].shape) == [tiny.vocab_size, 6]
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["DSparkDraftModel"] and config["model_type"] == "qwen3"
    assert (config["block_size"], config["num_target_layers"]) == (4, tiny.num_layers)
    inner = config["dflash_config"]
    assert inner["target_layer_ids"] == draft.config.target_layer_ids == [0, 2]
    assert (inner["projector_type"], inner["mask_token_id"]) == ("dspark", draft.config.mask_token_id)
    # SGLang parses the first and builds its heads from the second.
    for name in ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"):
        assert inner[name] == config[name]
    # Its STS calibration: a file with one key.
    sts = json.loads((tmp_path / "export" / "temperatures.json").read_text())
    assert sts == {"temperatures": [0.5, 1.0, 1.5, 2.0]}


def test_heads_that_only_dflash_config_tells_are_read(tmp_path: Path, tiny: Target) -> None:
    """SpecForge's own configs have them there alone."""
    draft = rounded(tiny, markov_head_type="gated")
    specforge.write(draft, tiny, tmp_path / "export", inputs={})
    names = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    settings(**dict.fromkeys(names))(tmp_path / "export")
    same_logits(draft, specforge.read(tmp_path / "export", tiny), tiny)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": 60}, "draft.draft_vocab_size=0"),
        ({"qk_norm": False}, "draft.qk_norm=true"),
        ({"sample_from_anchor": False}, "draft.sample_from_anchor=true"),
        (PLAIN, "draft.sample_from_anchor=false"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_what_can(
    tmp_path: Path,
    tiny: Target,
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        specforge.write(rounded(tiny, **changes), tiny, tmp_path / "export", inputs={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors(lambda t: t.pop("fc.weight")), "fc.weight is missing"),
        (tensors(lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})), "lm_head.weight is unknown"),
        (settings(architectures=["DeepSeekMTPModel"]), "DeepSeekMTPModel"),
        (settings(num_target_layers=5), "num_target_layers is 5, the target's is 4"),
        (settings(markov_rank=9), "markov_rank is 9 and in dflash_config 6"),
        (settings("dflash_config", target_layer_ids=[0, 4]), "0 to 3"),
        (settings("dflash_config", mask_token_id=384), "mask_token_id=384 is outside"),
        (settings("dflash_config", mask_token_id=None), "no mask_token_id"),
        (settings("dflash_config", projector_type="domino"), "projector_type 'domino'"),
        (settings(block_size=5), "temperatures.json must hold 5 numbers"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    tmp_path: Path,
    tiny: Target,
    damage: Damage,
    words: str,
) -> None:
    specforge.write(rounded(tiny), tiny, tmp_path / "export", inputs={})
    damage(tmp_path / "export")
    with pytest.raises(ArtifactError, match=words):
        specforge.read(tmp_path / "export", tiny)
