"""Checkpoints of other projects with an embedding or lm_head of their own: neither lost nor taken for the target's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.drafts.formats import deepspec, files, specforge, speculators
from pipeline.target import Target
from tests.drafts.formats.samples import rounded, tensors

EAGLE3: dict[str, Any] = {"algorithm": "eagle3", "num_layers": 1, "markov_head_type": "none", "qk_norm": False}
EAGLE3 |= {"enable_confidence_head": False, "target_layer_ids": [0, 2, 3], "vocabulary": 60}
FILES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "deepspec": (deepspec, {}),
    "speculators": (speculators, {"vocabulary": 60}),
    "specforge": (specforge, EAGLE3),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_lm_head_that_is_not_the_target_s_is_the_draft_s_own(tmp_path: Path, tiny: Target, kind: str) -> None:
    format, changes = FILES[kind]
    draft = rounded(tiny, **changes)
    format.write(draft, tiny, tmp_path / "foreign", inputs={})
    assert not files.owned(format.read(tmp_path / "foreign", tiny)), "the target's, though in the file"
    tensors(lambda t: t["lm_head.weight"].mul_(2))(tmp_path / "foreign")
    again = format.read(tmp_path / "foreign", tiny)
    assert files.owned(again) == {"lm_head.weight": "draft.own_lm_head"}
    hidden = torch.randn(3, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.logits(hidden), 2 * draft.logits(hidden))
    assert torch.equal(again.embed, draft.embed) and not again.config.own_embedding
    # Written again it is the same file.
    format.write(again, tiny, tmp_path / "back", inputs={})
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("foreign", "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
