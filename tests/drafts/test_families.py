"""Drafts for targets of other families inherit what those do to embeddings and logits, in training and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig

from pipeline.config import TrainerConfig, WarmStartConfig
from pipeline.decoding.proposers import make_proposer
from pipeline.drafts.config import DraftConfig, resolve, rope_theta_of
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.warm_start import layers_from_target
from pipeline.errors import ConfigError
from pipeline.target import Target, features_of
from pipeline.training import start
from tests.drafts.samples import small_draft
from tests.drafts.test_parity import all_held, begin, commit, training_logits
from tests.target.tiny_families import BUILDERS, tiny_target
from tests.training.test_step import EAGLE3, KINDS, check_against_plain

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}
GEMMA = ["gemma2, both softcaps", "gemma3", "gemma4", "gemma4, shared keys"]


def draft_for(target: Target, **changes: Any) -> DSparkDraft:
    return small_draft(target, **(SIZES if target.family.name == "deepseek_v4" else {}), **changes)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_draft_embeds_and_scores_as_its_target_does(name: str) -> None:
    """The anchor's slot holds what the target's embedding module gives; lm_head behaves as in the target's logits."""
    target = tiny_target(name)
    draft = draft_for(target)
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        slots = draft.block_input(ids[0]).unflatten(0, (12, -1))
        torch.testing.assert_close(slots[:, 0], target.family.embed_tokens(ids[0]), rtol=0, atol=0)
        mask = target.family.embed_tokens(torch.tensor(draft.config.mask_token_id))
        torch.testing.assert_close(slots[:, 1:], mask.expand_as(slots[:, 1:]), rtol=0, atol=0)
        _, (last,) = features_of(target, [0], ids, [12])
        wanted = target.model(ids).logits[0][:, draft.d2t]
        torch.testing.assert_close(draft.logits(last), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [{}, KINDS["dflash"], EAGLE3], ids=["dspark", "dflash", "eagle3"])
@pytest.mark.parametrize("name", [*GEMMA, "deepseek_v4"])
def test_a_training_step_is_the_plain_formulation_over_the_target_s_own_logits(name: str, kind: dict[str, Any]) -> None:
    target = tiny_target(name)
    check_against_plain(target, draft_for(target, **kind))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", [{}, KINDS["dflash"], EAGLE3], ids=["dspark", "dflash", "eagle3"])
@pytest.mark.parametrize("name", [*GEMMA, "gemma4, its layers", "gemma4, keys are values, its layers"])
def test_a_decoded_block_has_the_training_forwards_logits(name: str, kind: dict[str, Any], pack: bool) -> None:
    target = tiny_target(name.removesuffix(", its layers"))
    draft = draft_for(target, layer_family="gemma4" if name.endswith("its layers") else "llama", **kind)
    tokens = torch.randint(3, 90, (15,), generator=torch.Generator().manual_seed(3))
    (taps,), _ = features_of(target, draft.config.target_layer_ids, tokens[None], [15])
    proposer = make_proposer(draft.config.algorithm, draft, rule="ratio", pack=pack)
    proposer.attach(all_held())
    sequence = begin(proposer, tokens.tolist(), temperature=1.0, seed=4)
    commit(proposer, sequence, 0, taps[:6])
    commit(proposer, sequence, 6, taps[6:14])

    proposal = proposer.propose([sequence])

    expected = training_logits(draft, tokens, taps, 14, proposal.tokens[0])
    torch.testing.assert_close(proposal.logits[0], expected, rtol=1e-4, atol=1e-4)
    if draft.markov_head is None:  # the Markov bias is added behind the cap
        assert float(proposal.logits[0].abs().max()) <= target.family.logit_softcap


def test_sizes_left_open_are_those_of_the_target_s_first_layer() -> None:
    target = tiny_target("gemma4, keys are values")
    config = resolve(DraftConfig(target_layer_ids=[1]), target.config, target.unused_token)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 48


def test_deepseek_v4_has_no_sizes_to_take_over() -> None:
    target = tiny_target("deepseek_v4")
    with pytest.raises(ConfigError, match=r"draft.num_heads, draft.num_kv_heads, draft.head_dim, draft.intermediate"):
        resolve(DraftConfig(target_layer_ids=[1]), target.config, target.unused_token)
    with pytest.raises(ConfigError, match=r"^draft.head_dim must be set"):
        resolve(DraftConfig(**{**SIZES, "head_dim": 0}), target.config, target.unused_token)


def test_the_draft_s_rotary_base_is_that_of_the_layers_that_rotate_plainly() -> None:
    assert rope_theta_of(Gemma4TextConfig()) == 10_000.0  # full attention is proportional, 1e6
    assert rope_theta_of(tiny_target("gemma3").config) == 1_000_000.0  # plain in both; full attention first
    assert rope_theta_of(tiny_target("deepseek_v4").config) == 10_000.0
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    assert rope_theta_of(LlamaConfig(rope_parameters=scaled)) == 5e5


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v4", "qwen2, mixed windows"])
def test_layers_of_another_kind_are_not_copied(name: str) -> None:
    target = tiny_target(name)
    draft = draft_for(target)
    before = draft.fc.weight.clone()
    with pytest.raises(ConfigError, match=r"layers=target can't copy layers of a .*Use trainer.warm_start.layers=none"):
        layers_from_target(draft, target.family)
    assert torch.equal(draft.fc.weight, before)


def test_auto_starts_from_nothing_where_layers_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> DSparkDraft:
        target = tiny_target(name)
        monkeypatch.setattr(start, "read_token_counts", lambda _: torch.ones(target.vocab_size).numpy())
        trainer = TrainerConfig(warm_start=WarmStartConfig(layers="auto"))
        draft = start.build_draft(
            DraftConfig(markov_head_type="none", target_layer_ids=[0, 1]), trainer, target, Path("corpus"), []
        )
        assert isinstance(draft, DSparkDraft)
        return draft

    llama = build("llama")
    assert torch.equal(llama.norm.weight, tiny_target("llama").family.final_norm_gain)
    assert torch.equal(build("gemma4").norm.weight, torch.ones(32))
