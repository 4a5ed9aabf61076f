"""A saved draft comes back the same, and one that can't fit says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.artifact import MANIFEST
from pipeline.drafts.checkpoint import CONFIG, load_draft, make_draft, save_draft
from pipeline.drafts.config import DraftConfig, default_layer_ids, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.vocabulary import choose_vocabulary
from pipeline.drafts.warm_start import from_former, layers_from_target, markov_from_bigrams
from pipeline.errors import ArtifactError, ConfigError, DraftlineError
from pipeline.target import Target
from tests.drafts.samples import small_draft
from tests.target.tiny_families import tiny_target


def _save(path: Path, draft: DSparkDraft, target: Target, identity: dict[str, str] | None = None) -> Path:
    save_draft(path, draft, target=identity or target.identity.as_dict(), config={}, inputs={})
    return path


def test_a_draft_survives_the_round_trip(tmp_path: Path, draft: DSparkDraft, tiny: Target) -> None:
    draft.temperatures.mul_(1.5)
    again = load_draft(_save(tmp_path / "draft", draft, tiny), tiny)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config == draft.config


def test_nothing_borrowed_is_stored(draft: DSparkDraft) -> None:
    assert not {"embed", "lm_rows"} & set(draft.state_dict())


def test_matrices_of_its_own_start_as_the_targets_and_are_stored(tmp_path: Path, tiny: Target) -> None:
    config = DraftConfig(target_layer_ids=[0, 2], own_embedding=True, own_lm_head=True)
    ids = torch.arange(0, tiny.vocab_size, 2)
    draft = make_draft(resolve(config, tiny.config, tiny.unused_token), tiny, ids)
    embedding, head = tiny.family.embed_tokens.weight.detach(), tiny.lm_head_weight.detach()
    assert torch.equal(draft.embed, embedding) and torch.equal(draft.lm_rows, head[ids])
    assert {"embed", "lm_rows"} <= {n for n, p in draft.named_parameters() if p.requires_grad}
    with torch.no_grad():
        draft.embed += 1
        draft.lm_rows += 2
    assert not torch.equal(draft.embed, tiny.family.embed_tokens.weight), "a copy"
    save_draft(tmp_path / "draft", draft, target=tiny.identity.as_dict(), config={}, inputs={})
    again = load_draft(tmp_path / "draft", tiny)
    assert torch.equal(again.embed, embedding + 1) and torch.equal(again.lm_rows, head[ids] + 2)


def test_a_draft_of_another_target_is_refused_naming_what_differs(
    tmp_path: Path, draft: DSparkDraft, tiny: Target
) -> None:
    other = {**tiny.identity.as_dict(), "tokenizer_digest": "f" * 64}
    with pytest.raises(ArtifactError, match="tokenizer_digest"):
        load_draft(_save(tmp_path / "draft", draft, tiny, other), tiny)


def test_an_altered_weight_file_is_refused(tmp_path: Path, draft: DSparkDraft, tiny: Target) -> None:
    path = _save(tmp_path / "draft", draft, tiny)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        load_draft(path, tiny)


def test_a_config_that_does_not_match_the_tensors_is_refused_tensor_by_tensor(
    tmp_path: Path, draft: DSparkDraft, tiny: Target
) -> None:
    path = _save(tmp_path / "draft", draft, tiny)
    raw = json.loads((path / CONFIG).read_text())
    raw["markov_rank"] = 16
    (path / CONFIG).write_text(json.dumps(raw))
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"][CONFIG]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"markov_head.markov_w1.weight has shape \[384, 8\], the config gives"):
        load_draft(path, tiny)


def test_a_vocabulary_beyond_the_target_is_refused(tmp_path: Path, draft: DSparkDraft, tiny: Target) -> None:
    draft.d2t[-1] = tiny.vocab_size
    with pytest.raises(ArtifactError, match="vocabulary"):
        load_draft(_save(tmp_path / "draft", draft, tiny), tiny)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_token_id", 384, "mask_token_id=384"),
        ("target_layer_ids", [0, 4], "target_layer_ids holds 4"),
        ("hidden_size", 32, "hidden_size=32"),
        ("draft_vocab_size", 385, "draft_vocab_size=385"),
    ],
)
def test_a_config_that_cannot_fit_is_refused(tiny: Target, field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(DraftConfig(**{field: value}), tiny.config, 0)  # type: ignore[arg-type]


def test_default_taps_are_the_published_ones() -> None:
    assert default_layer_ids(36) == [1, 9, 17, 25, 33]


def test_the_vocabulary_holds_the_most_frequent_tokens_and_the_kept_ones() -> None:
    counts = torch.tensor([0, 5, 9, 1, 7])
    assert choose_vocabulary(counts, 3, [0], 6).tolist() == [0, 2, 4]
    assert choose_vocabulary(counts, 0, [0], 6).tolist() == list(range(6))
    with pytest.raises(DraftlineError, match="draft_vocab_size=9"):
        choose_vocabulary(counts, 9, [], 6)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_the_markov_head_starts_from_the_corpus_bigrams(tiny: Target, kind: str) -> None:
    """After the closed-form start, the likeliest follower of a token is the one that followed it most."""
    draft = small_draft(tiny, vocabulary=0, markov_head_type=kind)
    previous = torch.tensor([10, 10, 11, 12, 12])
    following = torch.tensor([20, 22, 40, 22, 60])
    markov_from_bigrams(draft, (previous, following, torch.tensor([28, 2, 30, 1, 29])))
    hidden = torch.randn(3, draft.config.hidden_size, generator=torch.Generator().manual_seed(0))
    bias, _ = draft.markov_step(hidden, torch.tensor([10, 11, 12]))
    assert isinstance(bias, torch.Tensor)
    assert draft.d2t[bias.argmax(-1)].tolist() == [20, 40, 60]
    unseen, _ = draft.markov_step(hidden[:1], torch.tensor([99]))
    assert torch.equal(unseen, torch.zeros(1, len(draft.d2t)))


def test_layers_start_from_the_targets_last(draft: DSparkDraft, tiny: Target) -> None:
    layers_from_target(draft, tiny.family)
    mine = draft.layers[-1].mlp.gate_proj.weight
    assert torch.equal(mine, tiny.family.layers[-1].mlp.gate_proj.weight)
    assert torch.equal(draft.norm.weight, tiny.family.final_norm.weight)


def test_a_dspark_draft_starts_from_a_dflash_draft(tiny: Target) -> None:
    """And keeps its own heads, which the former has not."""
    plain = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
    former = small_draft(tiny, vocabulary=0, seed=1, **plain)
    draft = small_draft(tiny, vocabulary=60, seed=2, block_size=6)
    heads = {n: t.clone() for n, t in draft.named_parameters() if "head" in n}
    assert set(from_former(draft, former)) == set(heads)
    given = dict(former.named_parameters())
    for name, weight in draft.named_parameters():
        assert torch.equal(weight, heads[name] if name in heads else given[name]), name


def test_a_markov_head_goes_over_token_by_token(tiny: Target) -> None:
    former, draft = small_draft(tiny, vocabulary=60, seed=1), small_draft(tiny, vocabulary=0, seed=2)
    former.temperatures.fill_(2.0)
    assert from_former(draft, former) == []
    head, theirs = draft.markov_head, former.markov_head
    assert head is not None and theirs is not None
    assert torch.equal(head.markov_w1.weight, theirs.markov_w1.weight)
    assert torch.equal(head.markov_w2.weight[former.d2t], theirs.markov_w2.weight)
    others = torch.ones(tiny.vocab_size, dtype=torch.bool)
    others[former.d2t] = False
    assert not head.markov_w2.weight[others].any(), "what stood there belonged to another W1"
    assert torch.equal(draft.temperatures, torch.ones(4)), "calibration belongs to the former's weights"


def test_heads_go_over_whole_or_not_at_all(tiny: Target) -> None:
    former, draft = small_draft(tiny, seed=1, markov_head_type="rnn"), small_draft(tiny, seed=2)
    before = {n: t.clone() for n, t in draft.named_parameters() if "head" in n}
    assert set(from_former(draft, former)) == set(before), "codes of another kind, and the confidence that reads them"
    assert all(torch.equal(t, before[n]) for n, t in draft.named_parameters() if "head" in n)


def test_a_former_draft_of_the_other_slot_layout_is_refused(tiny: Target) -> None:
    plain = {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False}
    with pytest.raises(ConfigError, match="sample_from_anchor is False there, True here"):
        from_former(small_draft(tiny), small_draft(tiny, sample_from_anchor=False, **plain))


def test_a_former_draft_that_saw_another_context_is_refused(tiny: Target) -> None:
    with pytest.raises(ConfigError, match=r"sliding_windows is \[64, 64\] there, \[\] here"):
        from_former(small_draft(tiny), small_draft(tiny, sliding_windows=[64, 64]))


def test_gemma4_s_layer_scalars_go_over() -> None:
    gemma = tiny_target("gemma4")
    former, draft = (small_draft(gemma, seed=n, layer_family="gemma4") for n in (1, 2))
    with torch.no_grad():
        former.decoder_layers[1].layer_scalar.fill_(0.5)
    assert from_former(draft, former) == []
    assert [float(layer.layer_scalar) for layer in draft.decoder_layers] == [1.0, 0.5]


def test_a_former_draft_that_has_nothing_to_give_is_refused_field_by_field(tiny: Target) -> None:
    draft = small_draft(tiny)
    former = small_draft(tiny, num_layers=1, target_layer_ids=[1, 2])
    with pytest.raises(ConfigError, match=r"target_layer_ids is \[1, 2\] there, \[0, 2\] here; num_layers is 1 there"):
        from_former(draft, former)
    eagle3 = {"algorithm": "eagle3", "markov_head_type": "none", "enable_confidence_head": False, "num_layers": 1}
    with pytest.raises(ConfigError, match="algorithm is eagle3 there, dspark here"):
        from_former(draft, small_draft(tiny, **eagle3))


def test_more_layers_than_the_target_has_are_refused_by_number(tiny: Target) -> None:
    with pytest.raises(ConfigError, match="draft.num_layers=5, but the target has 4 layers"):
        layers_from_target(small_draft(tiny, num_layers=5), tiny.family)


def test_an_lm_head_of_its_own_goes_over_token_by_token_and_not_to_a_draft_that_borrows(tiny: Target) -> None:
    former = small_draft(tiny, vocabulary=60, seed=1, own_lm_head=True)
    draft = small_draft(tiny, vocabulary=0, seed=2, own_lm_head=True)
    with torch.no_grad():
        former.lm_rows.add_(1.0)
    targets = draft.lm_rows.detach().clone()
    assert from_former(draft, former) == []
    assert torch.equal(draft.lm_rows[former.d2t], former.lm_rows)
    others = torch.ones(tiny.vocab_size, dtype=torch.bool)
    others[former.d2t] = False
    assert torch.equal(draft.lm_rows[others], targets[others])
    with pytest.raises(ConfigError, match=r"draft\.own_lm_head is true there, false here"):
        from_former(small_draft(tiny, seed=2), former)
