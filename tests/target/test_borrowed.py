"""What a draft borrows is read alone, and is bit for bit what the whole target has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import TargetConfig
from pipeline.errors import DraftlineError
from pipeline.target import Target, load_borrowed, load_target, loading, obtain
from tests.target.tiny_families import BUILDERS, tiny_target


@pytest.fixture
def no_whole_target(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the whole target was loaded")

    monkeypatch.setattr(loading, "load_target", refuse)
    yield


def _saved(name: str, cache_dir: Path, folder: Path, **options: Any) -> Path:
    """A family's tiny target with the tokenizer of the tiny one."""
    tiny_target(name).model.save_pretrained(folder, **options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(obtain(TargetConfig(path="tiny"), cache_dir) / file, folder)
    return folder


def _assert_borrows(mine: Target, whole: Target) -> None:
    for a, b in (
        (mine.family.embed_tokens.weight, whole.family.embed_tokens.weight),
        (mine.lm_head_weight, whole.lm_head_weight),
        (mine.family.final_norm_gain, whole.family.final_norm_gain),
    ):
        assert a.dtype == b.dtype and a.device.type == "cpu" and torch.equal(a, b)
    tied = [t.family.embed_tokens.weight is t.family.lm_head.weight for t in (mine, whole)]
    assert tied[0] == tied[1]
    for name in ("name", "embed_scale", "logit_softcap", "placeholders", "blank", "streams", "layer_obstacle"):
        assert getattr(mine.family, name) == getattr(whole.family, name), name
    for name in ("identity", "eos_ids", "unused_token", "vocab_size", "hidden_size", "num_layers", "dtype", "device"):
        assert getattr(mine, name) == getattr(whole, name), name
    assert mine.config.to_dict() == whole.config.to_dict()
    kept = {id(t) for t in (mine.family.embed_tokens.weight, mine.lm_head_weight, mine.family.final_norm.weight)}
    assert all(p.is_meta for p in mine.model.parameters() if id(p) not in kept), "nothing else takes memory"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_lends_what_its_whole_target_has(
    name: str, dtype: str, cache_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = TargetConfig(path=str(_saved(name, cache_dir, tmp_path / "target")), dtype=dtype)
    whole = load_target(config, cache_dir)
    request.getfixturevalue("no_whole_target")
    _assert_borrows(load_borrowed(config, cache_dir), whole)


@pytest.mark.usefixtures("no_whole_target")
def test_other_layers_are_not_read(cache_dir: Path, tiny: Target, tmp_path: Path) -> None:
    """Of several files, those of the layers may be missing."""
    folder = _saved("llama", cache_dir, tmp_path / "target", max_shard_size="12KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {index[n] for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") if n in index}
    layers = {f for f in index.values() if f not in kept}
    assert layers
    for file in layers:
        raw = bytearray((folder / file).read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little")
        (folder / file).write_bytes(raw[:header] + bytes([255]) * (len(raw) - header))  # NaN, if it were read
    mine = load_borrowed(TargetConfig(path=str(folder)), cache_dir)
    assert torch.equal(mine.lm_head_weight, tiny_target("llama").lm_head_weight)


def test_a_tied_head_is_the_embedding(cache_dir: Path, tiny: Target) -> None:
    mine = load_borrowed(TargetConfig(path="tiny"), cache_dir)
    assert mine.lm_head_weight is mine.family.embed_tokens.weight
    _assert_borrows(mine, tiny)


def test_matrices_in_a_form_of_their_own_are_left_to_the_whole_load(cache_dir: Path, tiny: Target, tmp_path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(obtain(TargetConfig(path="tiny"), cache_dir), folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["somewhere.else"] = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    mine = load_borrowed(TargetConfig(path=str(folder)), cache_dir)
    assert not any(p.is_meta for p in mine.model.parameters())
    assert torch.equal(mine.lm_head_weight, tiny.lm_head_weight)


@pytest.mark.parametrize("load", [load_target, load_borrowed])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>404</html>"])
def test_damaged_weights_are_one_error_with_file_and_remedy(
    load: Any, damage: Any, cache_dir: Path, tmp_path: Path
) -> None:
    folder = _saved("llama", cache_dir, tmp_path / "target", max_shard_size="12KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.embed_tokens.weight"]
    assert len(set(index.values())) > 1
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DraftlineError, match=rf"{file.name} is cut short or damaged .*download the target's weights"):
        load(TargetConfig(path=str(folder)), cache_dir)


def test_what_is_no_model_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    shutil.copytree(obtain(TargetConfig(path="tiny"), cache_dir), folder)
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(DraftlineError, match="'bloom'; supported are"):
        load_borrowed(TargetConfig(path=str(folder)), cache_dir)
