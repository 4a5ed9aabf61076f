"""The export job: a directory that an engine takes, or one line that says why not and what would do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.export import stage
from pipeline import artifact
from pipeline.drafts.checkpoint import save_draft
from pipeline.drafts.formats import specforge, speculators
from pipeline.entry import compose, recorder, run
from pipeline.registry import registration, versions
from pipeline.target import load_target
from tests.drafts.samples import small_draft
from tests.registry.reports import report
from tests.target.tiny_families import tiny_target


def prepare(place: Path, *, registered: bool = False, **changes: Any) -> list[str]:
    """A run with a calibrated draft, registered as champion if asked; returns its overrides."""
    overrides = ["experiment=smoke", f"output_root={place}", f"cache_dir={place}/cache"]
    config = compose(overrides)
    target = load_target(config.target, config.cache)
    draft = small_draft(target, **changes)
    draft.temperatures.copy_(torch.tensor([0.75, 1.0, 1.25, 1.5]))
    made = save_draft(config.run_dir / "calibrated", draft, target=target.identity.as_dict(), config={}, inputs={})
    if registered:
        content = report(draft_digest=made.digest, target=target.identity.as_dict())
        with artifact.create(
            config.run_dir / "report", "report", config={}, inputs={}, target=target.identity.as_dict()
        ) as staging:
            (staging.path / "report.json").write_text(json.dumps(content))
        kept = recorder(config)
        name = versions.model_name("tiny", "dspark")
        with kept.stage(kept.parent("smoke"), "register") as run_:
            version = registration.register(
                kept, lambda: run_, name, config.run_dir / "calibrated", config.run_dir / "report"
            )
        kept.client.set_registered_model_alias(name, "champion", version)
    return overrides


def shell_words(readme: str) -> list[str]:
    """The launch command as the shell would run it."""
    command = readme.split("```bash\n")[1].split("```")[0]
    echoed = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + command], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    return echoed.split("\0")[:-1]


def test_the_champion_is_exported_for_vllm_and_a_second_time_there_is_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = prepare(tmp_path, registered=True)
    assert run(stage, "export", [*overrides, "export.served_target=org/tiny"], ray=False) == 0
    out = tmp_path / "smoke" / "export-vllm"
    manifest = artifact.load(out, "export")
    assert set(manifest.files) == {"README.md", "config.json", "model.safetensors", "temperatures.json"}
    calibrated = artifact.load(tmp_path / "smoke" / "calibrated", "draft")
    assert manifest.inputs == {"draft": calibrated.digest} and manifest.target == calibrated.target
    assert manifest.config["format"] == "speculators"

    readme = (out / "README.md").read_text()
    words = shell_words(readme)
    assert words[:4] == ["vllm", "serve", "org/tiny", "--speculative-config"]
    assert json.loads(words[4]) == {"method": "dspark", "model": "/", "num_speculative_tokens": 4}
    for told in ("draftline-tiny-dspark version 1", calibrated.digest, (calibrated.target or {})["weight_digest"]):
        assert told in readme
    config = compose(overrides)
    draft = speculators.read(out, load_target(config.target, config.cache))
    assert draft.temperatures.tolist() == [0.75, 1.0, 1.25, 1.5]

    capsys.readouterr()
    assert run(stage, "export", [*overrides, "export.served_target=org/tiny"], ray=False) == 0
    assert "skipped, inputs and settings unchanged" in capsys.readouterr().out


def test_the_runs_own_draft_is_exported_for_sglang_with_its_calibration(tmp_path: Path) -> None:
    overrides = [*prepare(tmp_path, vocabulary=0), "export.engine=sglang", "export.version=calibrated"]
    out = tmp_path / "elsewhere"
    assert run(stage, "export", [*overrides, f"export.out={out}"], ray=False) == 0
    words = shell_words((out / "README.md").read_text())
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert options == {
        "--model-path": str(tmp_path / "cache" / "tiny"),
        "--speculative-algorithm": "DSPARK",
        "--speculative-draft-model-path": "/",
        "--speculative-num-draft-tokens": "5",
        "--speculative-dspark-confidence-sts-path": "//temperatures.json",
    }
    assert json.loads((out / "temperatures.json").read_text()) == {"temperatures": [0.75, 1.0, 1.25, 1.5]}
    config = compose(overrides)
    assert specforge.read(out, load_target(config.target, config.cache)).config.markov_head_type == "vanilla"


def test_a_draft_without_confidences_is_served_with_static_verification(tmp_path: Path) -> None:
    overrides = prepare(tmp_path, vocabulary=0, enable_confidence_head=False)
    more = ["export.engine=sglang", "export.version=calibrated", "export.served_target='/models/a b'"]
    assert run(stage, "export", [*overrides, *more], ray=False) == 0
    words = shell_words((tmp_path / "smoke" / "export-sglang" / "README.md").read_text())
    assert words[0] == "SGLANG_RAGGED_VERIFY_MODE=static"
    assert words[words.index("--model-path") + 1] == "/models/a b"
    assert "--speculative-dspark-confidence-sts-path" not in words


def test_a_draft_that_the_engine_does_not_load_leaves_one_line_and_no_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*prepare(tmp_path, vocabulary=60), "export.engine=sglang", "export.version=calibrated"]
    capsys.readouterr()
    assert run(stage, "export", overrides, ray=False) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("export: SGLang does not load this draft as specforge.")
    assert "as it is with export.engine=vllm export.format=speculators" in said
    assert "draft.draft_vocab_size=0" in said
    assert not [p for p in (tmp_path / "smoke").iterdir() if "export" in p.name]


def test_a_draft_that_cannot_be_registered_is_exported_as_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine does not decode DeepSeek-V4, so its drafts are neither calibrated nor measured here."""
    plain = compose([f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache", "target=tiny"])
    tiny_target("deepseek_v4").model.save_pretrained(tmp_path / "v4")
    load_target(plain.target, plain.cache).tokenizer.save_pretrained(tmp_path / "v4")
    overrides = ["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"]
    overrides.append(f"target.path={tmp_path / 'v4'}")
    config = compose(overrides)
    target = load_target(config.target, config.cache)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}
    made = save_draft(
        config.run_dir / "draft",
        small_draft(target, **sizes),
        target=target.identity.as_dict(),
        config={},
        inputs={},
    )
    assert run(stage, "export", overrides, ray=False) == 2
    assert "export it as it is with export.version=trained" in capsys.readouterr().err
    assert run(stage, "export", [*overrides, "export.version=trained"], ray=False) == 0, capsys.readouterr().err
    readme = (config.run_dir / "export-vllm" / "README.md").read_text()
    assert "draft of the run smoke as trained, neither calibrated nor measured" in readme and made.digest in readme
    out = [*overrides, f"export.version={config.run_dir / 'draft'}", f"export.out={tmp_path / 'again'}"]
    assert run(stage, "export", out, ray=False) == 0
    assert speculators.read(tmp_path / "again", target).config.algorithm == "dspark"
