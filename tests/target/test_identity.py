"""An identity follows the bytes; families are known or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pipeline.config import TargetConfig
from pipeline.errors import ConfigError, DraftlineError
from pipeline.identity import differing, same_target
from pipeline.target import Target, family_of, features_of, load_identity, load_target, load_tokenizer, loading, obtain

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _copy(cache_dir: Path, to: Path) -> Path:
    return shutil.copytree(obtain(TargetConfig(path="tiny"), cache_dir), to)


def test_one_changed_weight_is_another_target(cache_dir: Path, tiny: Target, tmp_path: Path) -> None:
    copy = _copy(cache_dir, tmp_path / "tuned")
    before = load_identity(TargetConfig(path=str(copy)), cache_dir)
    assert before.weight_digest == tiny.identity.weight_digest
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    after = load_identity(TargetConfig(path=str(copy)), cache_dir)
    assert after.weight_digest != before.weight_digest
    assert after.revision == after.weight_digest[:12]
    assert after.tokenizer_digest == before.tokenizer_digest


def test_a_copy_elsewhere_is_the_same_target_and_whatever_else_differs_is_told(tiny: Target) -> None:
    made = tiny.identity.as_dict()
    assert same_target(made, {**made, "id": "copy"})
    for field in set(made) - {"id"}:
        assert differing(made, {**made, field: "x"}) == [field] == differing({**made, field: "x"}, made)
    assert not same_target(None, made) and same_target(None, None)
    assert differing({k: v for k, v in made.items() if k != "config_digest"}, made) == ["config_digest"]


def test_another_rotary_base_is_another_target_and_another_writer_is_not(cache_dir: Path, tmp_path: Path) -> None:
    file = _copy(cache_dir, tmp_path / "stretched") / "config.json"
    before = load_identity(TargetConfig(path=str(file.parent)), cache_dir)
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"transformers_version": "0.0", "dtype": "bfloat16"}))
    assert load_identity(TargetConfig(path=str(file.parent)), cache_dir) == before
    file.write_text(json.dumps(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}))
    after = load_identity(TargetConfig(path=str(file.parent)), cache_dir)
    assert after.config_digest != before.config_digest and after.weight_digest == before.weight_digest


def test_a_changed_tokenizer_is_another_target(cache_dir: Path, tiny: Target, tmp_path: Path) -> None:
    copy = _copy(cache_dir, tmp_path / "retokenized")
    file = copy / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|pad|>"', '"<|fill|>"'))
    identity = load_identity(TargetConfig(path=str(copy)), cache_dir)
    assert identity.tokenizer_digest != tiny.identity.tokenizer_digest
    assert identity.weight_digest == tiny.identity.weight_digest


def test_weights_are_hashed_once(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TargetConfig(path=str(_copy(cache_dir, tmp_path / "hashed")), revision="r7")
    first = load_identity(config, cache_dir)
    assert first.revision == "r7"

    def sha256_file(path: Path) -> str:
        assert path.suffix != ".safetensors", f"{path} was hashed again"
        return real(path)

    real = loading.sha256_file
    tokenizer = load_tokenizer(config, cache_dir)
    monkeypatch.setattr(loading, "sha256_file", sha256_file)
    assert load_identity(config, cache_dir, tokenizer) == first


def test_a_model_without_safetensors_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    copy = _copy(cache_dir, tmp_path / "pickled")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(DraftlineError, match="no .safetensors file"):
        load_identity(TargetConfig(path=str(copy)), cache_dir)


def test_a_loaded_target_is_frozen_and_in_the_configured_dtype(cache_dir: Path, tiny: Target) -> None:
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert (tiny.num_layers, tiny.hidden_size, tiny.dtype) == (4, 64, torch.float32)
    half = load_target(TargetConfig(path="tiny", dtype="bfloat16"), cache_dir)
    assert half.dtype == torch.bfloat16
    assert half.identity == tiny.identity


def test_the_unused_token_is_no_token_of_a_text(tiny: Target) -> None:
    assert tiny.unused_token < tiny.vocab_size
    assert tiny.unused_token not in tiny.eos_ids
    chat = tiny.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=True)["input_ids"]
    assert tiny.unused_token not in chat


def test_a_target_that_may_use_every_token_asks_for_one(tiny: Target) -> None:
    class Tokenizer:
        bos_token_id, all_special_ids, chat_template = 1, [1, 2], "{{ '<|turn|>' }}"

        def __len__(self) -> int:
            return tiny.vocab_size

        def convert_ids_to_tokens(self, i: int) -> str:
            return ["", "<|bos|>", "<|turn|>"][i]

    with pytest.raises(ConfigError, match=r"draft\.mask_token_id="):
        _ = Target(tiny.model, Tokenizer(), tiny.identity).unused_token


@pytest.mark.parametrize(
    "model",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
    ],
    ids=["qwen3", "qwen3_moe"],
)
def test_other_families_are_tapped_alike(model, tiny: Target) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    target = Target(model(), tiny.tokenizer, tiny.identity)
    ids = torch.randint(0, 64, (2, 11))
    taps, last = features_of(target, [0, 2], ids, [11, 6])
    with torch.inference_mode():
        states = target.model(ids, output_hidden_states=True).hidden_states
    # Entry 3 is after the final norm here, so the final layer's raw output is compared through the norm.
    for b, n in ((0, 11), (1, 6)):
        torch.testing.assert_close(taps[b][:, :32], states[1][b, :n], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(target.family.final_norm(taps[b][:, 32:]), last[b], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(last[b], states[-1][b, :n], atol=1e-5, rtol=1e-4)
    assert family_of(target.model).lm_head is target.model.lm_head


def test_an_unsupported_family_is_refused_with_the_supported_ones() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(DraftlineError, match=r"'gpt2'; supported are .*llama.*qwen3, qwen3_moe"):
        family_of(model)
