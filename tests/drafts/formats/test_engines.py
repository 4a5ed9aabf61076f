"""Which drafts the engines load (formats.md 5c): every refusal names what loads, and that is true."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipeline.drafts.formats import engines
from pipeline.target import Target
from tests.drafts.samples import small_draft

PLAIN = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
DFLASH = {**PLAIN, "sample_from_anchor": False}
REDUCED = {"vocabulary": 60}
FULL = {"vocabulary": 0}


@pytest.mark.parametrize(
    ("changes", "engine", "format"),
    [
        (FULL, "vllm", "speculators"),
        (REDUCED, "vllm", "speculators"),
        (FULL, "vllm", "deepspec"),
        ({**FULL, "sample_from_anchor": False}, "vllm", "speculators"),
        ({**FULL, **DFLASH}, "vllm", "speculators"),
        ({**REDUCED, **DFLASH}, "vllm", "speculators"),
        ({**FULL, **DFLASH}, "vllm", "specforge"),
        (FULL, "sglang", "specforge"),
        (FULL, "sglang", "deepspec"),
        ({**FULL, "markov_head_type": "gated"}, "sglang", "specforge"),
        ({**FULL, "markov_head_type": "rnn"}, "sglang", "specforge"),
        ({**FULL, "enable_confidence_head": False}, "sglang", "specforge"),
        ({**FULL, **DFLASH}, "sglang", "specforge"),
        ({**FULL, "own_embedding": True, "own_lm_head": True}, "vllm", "speculators"),
        ({**REDUCED, "own_lm_head": True}, "vllm", "speculators"),
        ({**FULL, "own_lm_head": True}, "vllm", "deepspec"),
    ],
)
def test_what_the_engines_load(tiny: Target, changes: dict[str, Any], engine: str, format: str) -> None:
    assert engines.fit(small_draft(tiny, **changes), engine, format).loads


@pytest.mark.parametrize(
    ("changes", "engine", "format", "why", "nearest"),
    [
        # vLLM: the vanilla Markov head only; SGLang has the others.
        ({**FULL, "markov_head_type": "gated"}, "vllm", "", "is gated", "export.engine=sglang export.format=specforge"),
        ({**REDUCED, "markov_head_type": "rnn"}, "vllm", "", "is rnn", "draft.markov_head_type=vanilla"),
        # SGLang: the whole vocabulary and a Markov head.
        (REDUCED, "sglang", "", "60 of", "export.engine=vllm export.format=speculators"),
        (REDUCED, "sglang", "", "60 of", "draft.draft_vocab_size=0"),
        ({**REDUCED, **DFLASH}, "sglang", "", "60 of", "draft.draft_vocab_size=0"),
        ({**FULL, "markov_rank": 0}, "sglang", "", "has none", "draft.markov_rank=256"),
        ({**FULL, "markov_rank": 0}, "vllm", "", "has none", "draft.markov_head_type=vanilla"),
        ({**FULL, "sample_from_anchor": False}, "sglang", "", "anchor's slot", "export.engine=vllm"),
        # DeepSpec's DFlash: neither.
        ({**FULL, **PLAIN}, "vllm", "", "DeepSpec's layout", "draft.sample_from_anchor=false"),
        ({**FULL, **PLAIN}, "sglang", "", "SpecForge's dflash", "draft.sample_from_anchor=false"),
        ({**FULL, **PLAIN}, "vllm", "deepspec", "misses the Markov head", "draft.sample_from_anchor=false"),
        # Sliding layers are causal within a block there, not here.
        ({**FULL, "sliding_windows": [9, 0]}, "vllm", "", "sliding", "draft.sliding_windows=[]"),
        ({**FULL, "sliding_windows": [9, 0]}, "sglang", "", "sliding", "draft.sliding_windows=[]"),
        # A right draft in the other project's files.
        (FULL, "vllm", "specforge", "DeepSeek-V4", "export.engine=vllm export.format=speculators"),
        (FULL, "sglang", "speculators", "speculators_model_type", "export.engine=sglang export.format=specforge"),
        ({**FULL, **DFLASH}, "sglang", "speculators", "dflash_config", "export.engine=sglang export.format=specforge"),
        ({**FULL, "qk_norm": False}, "vllm", "", "QK norm", "draft.qk_norm=true"),
        ({**FULL, "own_lm_head": True}, "sglang", "", "target's lm_head", "draft.own_lm_head=false"),
        ({**FULL, "own_embedding": True}, "sglang", "deepspec", "embed_tokens", "draft.own_embedding=false"),
    ],
)
def test_what_they_do_not_load_is_told_with_the_nearest_that_loads(
    tiny: Target,
    changes: dict[str, Any],
    engine: str,
    format: str,
    why: str,
    nearest: str,
) -> None:
    draft = small_draft(tiny, **changes)
    result = engines.fit(draft, engine, format)
    assert not result.loads
    assert why in str(result) and nearest in str(result)
    for pair in result.elsewhere:
        assert engines.fit(draft, *pair).loads, pair
    # The settings it names make a draft that loads.
    if result.settings:
        named = {k.removeprefix("draft."): yaml.safe_load(v) for k, v in result.settings.items() if "draft." in k}
        if "draft_vocab_size" in named:
            named["vocabulary"] = named.pop("draft_vocab_size")
        assert engines.fit(small_draft(tiny, **{**changes, **named}), engine).loads
    assert result.elsewhere or result.settings


def test_every_obstacle_is_told_at_once(tiny: Target) -> None:
    draft = small_draft(tiny, vocabulary=60, markov_head_type="rnn", sliding_windows=[9, 9], sample_from_anchor=False)
    result = engines.fit(draft, "sglang")
    assert set(result.settings) == {
        "draft.draft_vocab_size",
        "draft.sliding_windows",
        "draft.sample_from_anchor",
    }
    assert "No combination" not in str(result) and result.elsewhere == ()


def test_softcapped_logits_have_no_combination_yet(tiny: Target) -> None:
    draft = small_draft(tiny, vocabulary=0)
    draft.logit_softcap = 30.0
    for engine in engines.OWN:
        result = engines.fit(draft, engine)
        assert "caps its logits at 30.0" in str(result) and "No combination of this version loads it" in str(result)


THREE = {"algorithm": "eagle3", "markov_head_type": "none", "enable_confidence_head": False, "num_layers": 1}
THREE |= {"target_layer_ids": [0, 1, 3], "qk_norm": False}


@pytest.mark.parametrize(
    ("changes", "engine", "format"),
    [
        ({**FULL, **THREE}, "vllm", "speculators"),
        ({**REDUCED, **THREE}, "vllm", "speculators"),
        ({**REDUCED, **THREE, "norm_before_residual": True}, "vllm", "speculators"),
        ({**FULL, **THREE}, "sglang", "specforge"),
        ({**REDUCED, **THREE}, "sglang", "specforge"),
        ({**REDUCED, **THREE, "own_lm_head": True}, "sglang", "specforge"),
        ({**FULL, **THREE, "own_embedding": True}, "vllm", "speculators"),
    ],
)
def test_the_eagle3_drafts_that_load(tiny: Target, changes: dict[str, Any], engine: str, format: str) -> None:
    assert engines.fit(small_draft(tiny, **changes), engine, format).loads


@pytest.mark.parametrize(
    ("changes", "engine", "format", "why", "nearest"),
    [
        ({"qk_norm": True}, "vllm", "", "without QK norm", "draft.qk_norm=false"),
        ({"target_layer_ids": [0, 1, 2, 3]}, "vllm", "", "this draft has 4", "draft.target_layer_ids=[0,2,3]"),
        ({"target_layer_ids": [0, 2]}, "sglang", "", "this draft has 2", "draft.target_layer_ids=[0,1,2]"),
        ({"norm_before_residual": True}, "sglang", "", "normalised g", "export.engine=vllm export.format=speculators"),
        ({"own_embedding": True}, "sglang", "", "target's embed_tokens", "export.engine=vllm"),
        ({}, "vllm", "specforge", "eagle_config", "export.engine=vllm export.format=speculators"),
        ({}, "sglang", "speculators", "no model class", "export.engine=sglang export.format=specforge"),
        ({"qk_norm": True}, "vllm", "deepspec", "no model class", "draft.qk_norm=false"),
    ],
)
def test_the_eagle3_drafts_that_do_not(
    tiny: Target,
    changes: dict[str, Any],
    engine: str,
    format: str,
    why: str,
    nearest: str,
) -> None:
    result = engines.fit(small_draft(tiny, **{**FULL, **THREE, **changes}), engine, format)
    assert not result.loads and why in str(result) and nearest in str(result)
    for pair in result.elsewhere:
        assert engines.fit(small_draft(tiny, **{**FULL, **THREE, **changes}), *pair).loads, pair
