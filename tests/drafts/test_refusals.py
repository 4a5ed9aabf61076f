"""Drafts that could only go wrong later are refused at once, by the setting or the tensor that is at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.drafts.checkpoint import load_draft, save_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target
from tests.drafts.samples import small_draft


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer_ids": [1, 1]}, r"\[1, 1\] names a layer twice"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"markov_rank": -1}, "markov_rank=-1"),
        ({"draft_vocab_size": -5}, "draft_vocab_size=-5"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of 3"),
        ({"sample_from_anchor": False, "block_size": 1}, "sample_from_anchor=false"),
        ({"algorithm": "dflash"}, "markov_head_type=none"),
        ({"sliding_windows": [64]}, "one per layer"),
        ({"sliding_windows": [64, 3]}, "must be above the block of 7"),
    ],
)
def test_a_setting_that_cannot_work_is_named(tiny: Target, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(DraftConfig(**{"target_layer_ids": [0, 2], **changes}), tiny.config, tiny.unused_token)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.temperatures.zero_(), "temperatures must be above 0"),
        (lambda d: d.fc.weight.data[0].fill_(float("nan")), "fc.weight has values that are not finite"),
        (lambda d: setattr(d, "d2t", d.d2t[:-1]), "59 tokens in its vocabulary .*config says 60"),
        (lambda d: d.d2t.copy_(d.d2t.flip(0)), "no ascending draft vocabulary"),
        (lambda d: d.d2t[0].fill_(-7), "has token -7 in its vocabulary; the target has 384"),
        (lambda d: d.d2t[-1].fill_(384), "has token 384 in its vocabulary"),
    ],
)
def test_a_checkpoint_that_cannot_decode_is_refused(
    tmp_path: Path, tiny: Target, damage: Callable[[DSparkDraft], Any], message: str
) -> None:
    draft = small_draft(tiny)
    damage(draft)
    save_draft(tmp_path / "draft", draft, target=tiny.identity.as_dict(), config={}, inputs={})
    with pytest.raises(ArtifactError, match=message):
        load_draft(tmp_path / "draft", tiny)


def test_a_sound_checkpoint_is_not(tmp_path: Path, tiny: Target) -> None:
    draft = small_draft(tiny)
    save_draft(tmp_path / "draft", draft, target=tiny.identity.as_dict(), config={}, inputs={})
    assert torch.equal(load_draft(tmp_path / "draft", tiny).d2t, draft.d2t)


def test_a_checkpoint_of_another_project_is_not_taken_for_a_draft(tmp_path: Path, tiny: Target) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3DSparkModel"]}')
    with pytest.raises(ArtifactError, match=f"jobs/convert.py makes a draft of it: convert.checkpoint={tmp_path}"):
        load_draft(tmp_path, tiny)
