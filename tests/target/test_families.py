"""Every family alike: taps are the layers' raw outputs, last_hidden under lm_head and softcap is the model's logits,
and what a draft inherits is what the model itself computes."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import TargetConfig
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target, check_family, family_of, features_of, load_config, load_target, obtain
from tests.target.tiny_families import BUILDERS, VOCABULARY, tiny_target

LENGTH = 23


@functools.cache
def target_of(name: str) -> Target:
    return tiny_target(name)


def _ids(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BUILDERS)
def test_taps_are_the_residual_stream_behind_each_layer_and_last_hidden_gives_the_logits(name: str) -> None:
    target = target_of(name)
    last_layer = target.num_layers - 1
    ids = _ids()
    layer_ids = [last_layer, 1, 0]
    (taps,), (last,) = features_of(target, layer_ids, ids, [LENGTH])
    with torch.inference_mode():
        plain = target.model(ids, output_hidden_states=True)
        logits = target.family.lm_head(last)
        if cap := target.family.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
    final, second, first = taps.split(target.hidden_size, dim=-1)

    # Entry i + 1 of the tuple is layer i, with the residual streams apart where there are several.
    for mine, entry in ((second, 2), (first, 1)):
        wanted = plain.hidden_states[entry][0]
        torch.testing.assert_close(mine, wanted.mean(-2) if wanted.dim() == 3 else wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(final, last, atol=1e-2)
    torch.testing.assert_close(logits, plain.logits[0], atol=2e-5, rtol=1e-4)
    if target.family.streams == 1:
        with torch.inference_mode():
            torch.testing.assert_close(target.family.final_norm(final), last, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_row_s_features_do_not_depend_on_neighbours_or_padding(name: str) -> None:
    target, lengths = target_of(name), [LENGTH, 5, 17]
    ids = _ids(3)
    taps, last = features_of(target, [0, 2], ids, lengths)
    for row, n, t, h in zip(ids, lengths, taps, last, strict=True):
        (alone,), (alone_last,) = features_of(target, [0, 2], row[None, :n], [n])
        torch.testing.assert_close(t, alone, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(h, alone_last, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDERS)
def test_scaled_rows_of_the_weight_are_what_the_target_s_embedding_gives(name: str, dtype: torch.dtype) -> None:
    """Drafts index the weight; the factor is rounded as the target rounds it (sqrt(32) is 5.65625 in bf16)."""
    model = tiny_target(name).model.to(dtype)
    family = family_of(model)
    ids = torch.arange(3, VOCABULARY)
    with torch.inference_mode():
        own = family.embed_tokens(ids)
        torch.testing.assert_close(family.embed_tokens.weight[ids] * family.embed_scale, own, rtol=0, atol=0)
    assert (family.embed_scale == 1.0) == ("gemma" not in name)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_final_norm_s_gain_is_what_it_multiplies_by(name: str) -> None:
    family = target_of(name).family
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = family.final_norm(x)
    unit = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(unit * family.final_norm_gain, wanted, atol=1e-4, rtol=1e-3)


def test_a_multimodal_target_is_its_text_model() -> None:
    target = target_of("gemma4, multimodal")
    assert target.family.backbone is target.model.model.language_model
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (3, 32, VOCABULARY)


def test_a_target_that_attends_in_both_directions_is_refused() -> None:
    model = tiny_target("gemma4").model
    model.config.use_bidirectional_attention = "all"
    with pytest.raises(DraftlineError, match="use_bidirectional_attention='all'.*must be causal"):
        family_of(model)


def test_a_near_miss_is_refused_with_its_reason() -> None:
    with pytest.raises(DraftlineError, match="'gemma3n_text'; supported are deepseek_v4.*AltUp streams"):
        check_family("gemma3n_text")


def test_an_unsupported_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    shutil.copytree(obtain(TargetConfig(path="tiny"), tmp_path), folder)
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(DraftlineError, match="'bloom'; supported are"):
        load_target(TargetConfig(path=str(folder)), tmp_path)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('{"model_type": "of-tomorrow"}', "not a model that transformers can load: .*`of-tomorrow`"),
        ("{}", "not a model that transformers can load: .*model_type"),
        ('{"model_ty', "not a model that transformers can load: .*JSON"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "does not take: .*'hidden_size' expected int, got str"),
        ('{"model_type": "bloom"}', "'bloom'; supported are"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_wherever_it_is_read(tmp_path: Path, written: str, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(written)
    for place in (tmp_path, file):
        with pytest.raises(DraftlineError, match=says) as e:
            load_config(place)
        assert "\n" not in str(e.value)


def test_tap_ids_are_checked_against_the_text_model_s_layers() -> None:
    target = target_of("gemma4, shared keys")
    features_of(target, [5], _ids(), [LENGTH])
    with pytest.raises(ConfigError, match="target's 6 layers"):
        features_of(target, [6], _ids(), [LENGTH])
