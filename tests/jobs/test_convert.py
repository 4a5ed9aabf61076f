"""Another project's checkpoint becomes the run's draft, and goes the whole way that a trained one goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs import calibrate, convert, corpus, evaluate, export, parity, promote, register
from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.drafts.checkpoint import load_draft
from pipeline.drafts.formats import deepspec, specforge, speculators
from pipeline.entry import compose, recorder, run
from pipeline.registry import versions
from pipeline.target import load_target
from tests.drafts.formats.samples import rounded, same_logits, settings, tensors

EAGLE3: dict[str, Any] = {"algorithm": "eagle3", "num_layers": 1, "markov_head_type": "none", "qk_norm": False}
EAGLE3 |= {"enable_confidence_head": False, "target_layer_ids": [0, 2, 3], "vocabulary": 60}
SHORT = ["experiment=smoke", "features=stream", "parity.prompts=2", "parity.max_new_tokens=6", "benchmark.prompts=2"]
SHORT += ["benchmark.calibrate_prompts=3", "benchmark.max_new_tokens=6", "benchmark.bootstrap=20"]


def prepare(place: Path, format: ModuleType, **changes: Any) -> tuple[Path, list[str]]:
    """A checkpoint as the project writes it, and the overrides of a run that reads it."""
    overrides = [*SHORT, f"output_root={place}", f"cache_dir={place}/cache"]
    config = compose(overrides)
    target = load_target(config.target, config.cache)
    format.write(rounded(target, **changes), target, place / "foreign", inputs={})
    for ours in ("manifest.json", "temperatures.json"):  # what no other project writes
        (place / "foreign" / ours).unlink()
    return place / "foreign", [*overrides, f"convert.checkpoint={place / 'foreign'}"]


def job(stage: Any, overrides: list[str]) -> int:
    return run(stage, "job", overrides, ray=False)


@pytest.mark.timeout(600)
def test_an_eagle3_checkpoint_goes_from_its_files_to_champion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its output rows were trained, as EAGLE-3's are; the run's own settings speak of DSpark."""
    foreign, overrides = prepare(tmp_path, specforge, **EAGLE3)
    tensors(lambda t: t["lm_head.weight"].mul_(2))(foreign)
    for stage in (corpus.stage, convert.stage, calibrate.stage):
        assert job(stage, overrides) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (
        "convert: eagle3, 1 layer, 4 tokens per block, taps [0, 2, 3], vocabulary 60 of 384; 0.1 M parameters" in said
    )
    assert "convert: lm_head.weight is not the target's: the draft keeps its own (draft.own_lm_head)" in said
    assert job(parity.main, overrides) == 0, capsys.readouterr()
    for stage in (evaluate.stage, register.stage, promote.stage):
        assert job(stage, overrides) == 0, capsys.readouterr().err
    config = compose(overrides)
    champion = versions.champion(recorder(config), "draftline-tiny-eagle3", config.cache)
    target = load_target(config.target, config.cache)
    same_logits(specforge.read(foreign, target), load_draft(champion.draft_dir, target), target)
    out = [*overrides, "export.engine=sglang"]
    assert job(export.stage, out) == 0, capsys.readouterr().err

    capsys.readouterr()
    assert job(convert.stage, overrides) == 0
    assert "skipped, inputs and settings unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(("format", "changes"), [(deepspec, {}), (speculators, {"vocabulary": 60})])
def test_a_format_is_known_by_its_config(tmp_path: Path, format: ModuleType, changes: dict[str, Any]) -> None:
    foreign, overrides = prepare(tmp_path, format, **changes)
    assert job(convert.stage, overrides) == 0
    manifest = artifact.load(tmp_path / "smoke" / "draft", "draft")
    assert manifest.info["converted"] == {
        "format": format.__name__.rsplit(".", 1)[1],
        "checkpoint": str(foreign),
    }
    config: PipelineConfig = compose(overrides)
    target = load_target(config.target, config.cache)
    draft = load_draft(tmp_path / "smoke" / "draft", target)
    same_logits(format.read(foreign, target), draft, target)
    assert not draft.config.own_embedding and not draft.config.own_lm_head


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, overrides = prepare(tmp_path, deepspec)

    def refusal(*more: str) -> str:
        capsys.readouterr()
        assert job(convert.stage, [*overrides, *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "convert.checkpoint has no value" in refusal("convert.checkpoint=''")
    assert "download a model of the hub first" in refusal("convert.checkpoint=org/model")
    settings(mask_token_id=9999)(foreign)
    assert "mask_token_id=9999 is outside the 384 embedding rows" in refusal()
    settings(architectures=["LlamaForCausalLM"])(foreign)
    assert "is of no format that is read (LlamaForCausalLM); there are: speculators, specforge, deepspec" in refusal()
    assert not (tmp_path / "smoke" / "draft").exists()


def test_a_trained_draft_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, overrides = prepare(tmp_path, deepspec)
    draft = tmp_path / "smoke" / "draft"
    with artifact.create(draft, "draft", config={}, inputs={"corpus": "c" * 64}) as staging:
        (staging.path / "config.json").write_text(json.dumps({}))
    assert job(convert.stage, overrides) == 2
    assert "holds a draft that this run trained. Convert under another name" in capsys.readouterr().err
    assert artifact.load(draft, "draft").inputs == {"corpus": "c" * 64}
