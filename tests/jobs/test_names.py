"""Every job means the same registered model by the same settings, with or without the run that made its versions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from jobs import export, promote, register, serve, train
from pipeline import artifact
from pipeline.config import PipelineConfig
from pipeline.drafts.checkpoint import save_draft
from pipeline.entry import compose, recorder, run
from pipeline.errors import ArtifactError, ConfigError
from pipeline.registry import registration
from pipeline.registry.versions import registered_name
from pipeline.target import load_target, obtain
from pipeline.training import trainer
from tests.drafts.samples import small_draft
from tests.jobs.test_export import prepare
from tests.registry.reports import report

NAME = "draftline-tiny-dspark"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root whose registry has a champion, and nothing else of the run that made it."""
    root = tmp_path_factory.mktemp("outputs")
    prepare(root, registered=True)
    shutil.rmtree(root / "smoke")
    return root


def settings(place: Path, *more: str) -> list[str]:
    return ["experiment=smoke", "name=another", f"output_root={place}", f"cache_dir={place}/cache", *more]


def test_the_name_is_of_target_and_family_or_given(tmp_path: Path) -> None:
    model = tmp_path / "My Model"
    model.mkdir()
    assert registered_name(compose(["experiment=qwen3_4b_dspark", "corpus=demo"])) == "draftline-qwen-qwen3-4b-dspark"
    assert registered_name(compose([f"target.path='{model}'", "draft=eagle3"])) == "draftline-my-model-eagle3"
    assert registered_name(compose(["tracking.model_name=ours"])) == "ours"


def test_a_champion_is_exported_served_and_trained_on_without_its_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(export.stage, "export", settings(place, "export.served_target=org/tiny"), ray=False) == 0
    assert (place / "another" / "export-vllm" / "README.md").is_file()
    deployed = []
    monkeypatch.setattr("pipeline.serving.app.deploy", lambda *_, **k: deployed.append(k["model_name"]) or "http://x")
    assert serve.start(compose(settings(place))) == ("http://x", "1")
    assert deployed == [NAME]
    found = train.former(compose(settings(place, "trainer.warm_start.draft=champion")))
    assert found is not None and (found / "manifest.json").is_file()


def a_corpus(config: PipelineConfig, content: str) -> Path:
    """A corpus artifact of a run, as far as its digest goes."""
    out = config.run_dir / "corpus"
    with artifact.create(out, "corpus", config={}, inputs={}) as staging:
        artifact.write_json(staging.path / "rows.json", content)
    return out


def train_on(root: Path, setting: str, former: str | None, seed: int) -> tuple[PipelineConfig, str]:
    """A run whose draft was trained from `former` (a digest) by this setting, registered and champion: its version."""
    config = compose(settings(root, f"trainer.warm_start.draft={setting}", "features=stream"))
    config = dataclasses.replace(config, name=f"run{seed}")
    target = load_target(config.target, config.cache)
    corpus = a_corpus(config, f"talks of {seed}")
    made_of, inputs, identity = trainer._made_from(config, None, corpus, config.cache, former)
    plain = trainer.stage_config(made_of)
    draft = small_draft(target, seed=seed)
    own = save_draft(config.run_dir / "draft", draft, target=identity, config=plain, inputs=inputs)
    place, report_dir = config.run_dir / "calibrated", config.run_dir / "report"
    made = save_draft(place, draft, target=identity, config={}, inputs={"draft": own.digest})
    with artifact.create(report_dir, "report", config={}, inputs={}, target=identity) as staging:
        artifact.write_json(staging.path / "report.json", report(draft_digest=made.digest, target=identity))
    kept = recorder(config)
    with kept.stage(kept.parent(config.name), "register") as run_:
        version = registration.register(kept, lambda: run_, NAME, place, report_dir)
    kept.client.set_registered_model_alias(NAME, "champion", version)
    return config, version


def with_former(config: PipelineConfig, which: str) -> PipelineConfig:
    start = dataclasses.replace(config.trainer.warm_start, draft=which)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, warm_start=start))


def digest_of_former(config: PipelineConfig) -> str:
    found = train.former(config)
    assert found is not None
    return artifact.load(found, "draft").digest


def test_a_run_whose_own_draft_became_champion_keeps_the_former_it_was_trained_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, registered=True)
    first = artifact.load(tmp_path / "smoke" / "calibrated", "draft").digest
    config, version = train_on(tmp_path, "champion", first, seed=2)
    own = artifact.load(config.run_dir / "calibrated", "draft").digest
    assert digest_of_former(config) == first
    assert "train: champion is this run's own draft; its former stays version 1" in capsys.readouterr().out
    other_lr = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, lr=0.5))
    assert digest_of_former(other_lr) == own, "other settings train on from the champion"
    assert digest_of_former(with_former(config, version)) == own, "a number means that version"
    assert digest_of_former(with_former(config, "challenger")) == own, "the draft was not trained by this setting"
    a_corpus(config, "talks of another night")
    assert digest_of_former(config) == own, "so does another corpus"
    a_corpus(config, "talks of 2")
    assert digest_of_former(config) == first
    other, _ = train_on(tmp_path, "champion", None, seed=3)
    anothers = artifact.load(other.run_dir / "calibrated", "draft").digest
    assert digest_of_former(config) == anothers, "a champion of another run is new work"
    assert digest_of_former(other) == anothers, "it had no former: now it trains on"


def test_a_former_that_is_registered_no_more_is_to_be_pinned(tmp_path: Path) -> None:
    prepare(tmp_path, registered=True)
    config, _ = train_on(tmp_path, "champion", "f" * 64, seed=2)
    with pytest.raises(ConfigError, match=rf"\(version 2\).*digest {'f' * 16}\) {NAME} has no version. Pin a version"):
        train.former(config)


def test_a_mistyped_former_draft_is_answered_with_both_readings(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = settings(place, "trainer.warm_start.draft=outputs/dem/draft")
    assert run(train.stage, "train", overrides, ray=False) == 2
    said = capsys.readouterr().err
    assert f"neither a draft's directory ({Path('outputs/dem/draft').absolute()} is none)" in said
    assert f"nor a version or alias of the registered model: {NAME} has no version" in said
    assert "there are: 1, challenger, champion" in said


def test_a_draft_is_not_registered_under_another_targets_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.setattr("pipeline.evaluation.parity.require_parity", lambda *_: None)
    overrides = ["experiment=smoke", "target=smollm2_135m", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"]
    assert run(register.stage, "register", overrides, ray=False) == 2
    assert "was made for the target 'tiny', and target.path='smollm2-135m'" in capsys.readouterr().err


def test_a_draft_is_registered_by_the_name_its_target_has_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(prepare(tmp_path, registered=True))
    monkeypatch.setattr("pipeline.evaluation.parity.require_parity", lambda *_: None)
    copy = shutil.copytree(obtain(config.target, config.cache), tmp_path / "moved")
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, path=str(copy)))
    assert register.stage(config) == "1"
    assert "draftline-moved-dspark version 1" in capsys.readouterr().out
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("{", '{"rope_scaling_note": 1,', 1))
    with pytest.raises(ArtifactError, match="was made for the target 'tiny'"):
        register.stage(config)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_it_deploys_takes_the_application_down(
    place: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    def deploy(*_: object, **__: object) -> str:
        raise interrupt

    taken = []
    monkeypatch.setattr("pipeline.serving.app.deploy", deploy)
    monkeypatch.setattr("pipeline.serving.app.undeploy", lambda name, timeout=30.0: taken.append((name, timeout)))
    for job in (serve.stage, serve.main):
        with pytest.raises(interrupt):
            job(compose(settings(place)))
    assert taken == [("draftline", 0)] * 2, "and nobody waits for requests that it never took"


def test_an_application_that_could_not_be_deployed_leaves_what_runs_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(*_: object, **__: object) -> str:
        raise RuntimeError("the port is another's")

    monkeypatch.setattr("pipeline.serving.app.deploy", deploy)
    monkeypatch.setattr("pipeline.serving.app.undeploy", lambda *_, **__: pytest.fail("it was not ours"))
    with pytest.raises(RuntimeError, match="another's"):
        serve.main(compose(settings(place)))


def test_a_second_register_and_promote_say_why_they_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, registered=True)
    monkeypatch.setattr("pipeline.evaluation.parity.require_parity", lambda *_: None)
    config: PipelineConfig = compose(["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"])
    register.stage(config)
    assert promote.stage(config).promoted
    capsys.readouterr()
    assert register.stage(config) == "1"
    assert promote.stage(config).promoted
    said = capsys.readouterr().out
    assert f"== register: skipped, draft and report unchanged: {NAME} version 1" in said
    assert "== promote: skipped, the gate says what it said before (promote)" in said
