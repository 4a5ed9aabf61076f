"""The exported files through the speculators package's own config and model classes (the extra `formats`)."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import TargetConfig
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.formats import speculators as ours
from pipeline.target import Target, obtain
from tests.drafts.formats.samples import rounded, same_logits
from tests.drafts.test_parity import training_logits
from tests.training.reference import training_hidden

theirs = pytest.importorskip("speculators", reason="needs the package speculators: run `make formats`")
attention = pytest.importorskip("speculators.models.attention")

PLAIN = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn, reduced vocabulary": {"markov_head_type": "rnn", "vocabulary": 60},
    "silent anchor, reduced vocabulary": {"sample_from_anchor": False, "vocabulary": 60},
    "hidden confidence": {"confidence_head_with_markov": False},
    "dflash": {**PLAIN, "sample_from_anchor": False},
    "dflash, reduced vocabulary": {**PLAIN, "sample_from_anchor": False, "vocabulary": 60},
}


def tiny_weights(cache: Path) -> torch.Tensor:
    return load_file(obtain(TargetConfig(path="tiny"), cache) / "model.safetensors")["model.embed_tokens.weight"]


def their_model(draft: DSparkDraft, target: Target, place: Path, cache: Path) -> Any:
    """Our export, loaded by the package, which takes embedding and lm_head from the target's own files."""
    path = obtain(TargetConfig(path="tiny"), cache)
    ours.write(draft, target, place / "export", inputs={}, served_target=str(path))
    config = theirs.SpeculatorModelConfig.from_pretrained(str(place / "export"))
    config.transformer_layer_config._attn_implementation = "eager"  # runs on a CPU without compiling
    return theirs.SpeculatorModel.from_pretrained(str(place / "export"), config=config, dtype=torch.float32).eval()


def their_block(
    model: Any, tokens: torch.Tensor, taps: torch.Tensor, anchor: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [K, Vd] and confidence logits [K] of the block at `anchor`, as the package's training forward hands them
    to its loss (which is Triton's, and left out)."""
    seen: dict[str, Any] = {}

    def compute_metrics(logits: torch.Tensor, targets: torch.Tensor, third: Any, *rest: Any, **more: Any) -> Any:
        seen.update(logits=logits, third=third)
        return torch.zeros(()), {}

    of = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(of, "compute_metrics", compute_metrics)
    # Their float mask is bfloat16 whatever the weights are.
    float_mask = functools.partial(attention.create_float_mask, dtype=torch.float32)
    monkeypatch.setattr(model, "_create_mask_fn", float_mask)
    # The one possible anchor: the only position in the loss mask.
    mask = torch.zeros(1, len(tokens), dtype=torch.long)
    mask[0, anchor] = 1
    with torch.no_grad():
        model(
            hidden_states=taps[None],
            input_ids=tokens[None],
            loss_mask=mask,
            verifier_last_hidden_states=torch.zeros(1, len(tokens), model.hidden_size),
            document_ids=torch.zeros(1, len(tokens), dtype=torch.long),
            max_anchors=1,
        )
    confidence = seen["third"].flatten() if model.config.speculators_model_type == "dspark" else None
    return seen["logits"][0], confidence


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_computes_our_logits_from_our_files(
    tmp_path: Path,
    tiny: Target,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    draft = rounded(tiny, **KINDS[kind])
    # The package reads the target's own files, in which the embedding is not a bfloat16 one as `rounded` makes it.
    files = tiny_weights(cache_dir)
    reduced = "vocabulary" in KINDS[kind]
    draft.embed.copy_(files)
    draft.lm_rows.copy_(files[draft.d2t].bfloat16() if reduced else files)
    model = their_model(draft, tiny, tmp_path, cache_dir)
    c = draft.config
    assert model.config.aux_hidden_state_layer_ids == [1, 3] and c.target_layer_ids == [0, 2]
    assert type(model).__name__ == ("DSparkDraftModel" if c.algorithm == "dspark" else "DFlashDraftModel")

    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, tiny.vocab_size, (20,), generator=g)
    taps = torch.randn(20, 2 * tiny.hidden_size, generator=g)
    anchor = 9
    logits, confidence = their_block(model, tokens, taps, anchor, monkeypatch)
    if not c.sample_from_anchor:
        logits = logits[1:]
        confidence = None if confidence is None else confidence[1:]

    wanted = training_logits(draft, tokens, taps, anchor, tokens[anchor + 1 : anchor + 1 + c.tokens_per_block])
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    if c.enable_confidence_head:
        assert confidence is not None
        hidden = training_hidden(draft, [tokens], [taps], [torch.tensor([anchor])])
        mine = draft.confidence(hidden, tokens[anchor : anchor + c.tokens_per_block])
        torch.testing.assert_close(confidence, mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("vocabulary", [0, 60])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_the_package_computes_our_eagle3(
    tmp_path: Path,
    tiny: Target,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    qk_norm: bool,
    vocabulary: int,
    norm_before_residual: bool,
) -> None:
    """Its unrolled forward, teacher-forced as ours, from our files; and back."""
    draft = rounded(
        tiny,
        **{**PLAIN, "algorithm": "eagle3", "num_layers": 1, "target_layer_ids": [0, 1, 3]},
        qk_norm=qk_norm,
        vocabulary=vocabulary,
        norm_before_residual=norm_before_residual,
    )
    files = tiny_weights(cache_dir)
    draft.embed.copy_(files.bfloat16())
    draft.lm_rows.copy_(files[draft.d2t].bfloat16())
    model = their_model(draft, tiny, tmp_path, cache_dir)
    assert type(model).__name__ == "Eagle3DraftModel"
    assert model.config.eagle_aux_hidden_state_layer_ids == [1, 2, 4]
    steps: list[torch.Tensor] = []

    def compute_metrics(logits: torch.Tensor, *rest: Any, **more: Any) -> Any:
        steps.append(logits[0])
        return torch.zeros(()), {}

    of = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(of, "compute_metrics", compute_metrics)
    float_mask = functools.partial(attention.create_float_mask, dtype=torch.float32)
    monkeypatch.setattr(model, "_create_mask_fn", float_mask)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, tiny.vocab_size, (20,), generator=g)
    taps = torch.randn(20, 3 * tiny.hidden_size, generator=g)
    with torch.no_grad():
        model(
            hidden_states=taps[None, :-1],
            input_ids=tokens[None, 1:],  # theirs come shifted: the token after each hidden state
            loss_mask=torch.ones(1, 19, dtype=torch.long),
            verifier_last_hidden_states=torch.zeros(1, 19, model.hidden_size),
            document_ids=torch.zeros(1, 19, dtype=torch.long),
            ttt_steps=4,
        )
    anchor = 9
    wanted = training_logits(draft, tokens, taps, anchor, tokens[anchor + 1 : anchor + 5])
    # The pair (hidden state before the anchor, anchor) predicts the first token; step k has gone k further.
    got = torch.stack([step[anchor - 1] for step in steps])
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    same_logits(draft, ours.read(tmp_path / "theirs", tiny), tiny)


def test_the_package_finds_its_fields_in_our_config(tmp_path: Path, tiny: Target) -> None:
    ours.write(rounded(tiny, vocabulary=60), tiny, tmp_path / "export", inputs={}, served_target="org/tiny")
    config = theirs.SpeculatorModelConfig.from_pretrained(str(tmp_path / "export"))
    assert type(config).__name__ == "DSparkSpeculatorConfig"
    assert (config.draft_vocab_size, config.block_size, config.mask_token_id) == (60, 4, tiny.unused_token)
    assert config.sample_from_anchor is True and config.sliding_window_non_causal is True
    assert config.speculators_config.verifier.name_or_path == "org/tiny"
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 4
    assert config.transformer_layer_config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("kind", ["vanilla", "rnn", "dflash"])
def test_we_read_what_the_package_writes(tmp_path: Path, tiny: Target, cache_dir: Path, kind: str) -> None:
    draft = rounded(tiny, **{**KINDS.get(kind, {"markov_head_type": "rnn"})})
    their_model(draft, tiny, tmp_path, cache_dir).save_pretrained(tmp_path / "theirs")
    same_logits(draft, ours.read(tmp_path / "theirs", tiny), tiny)
