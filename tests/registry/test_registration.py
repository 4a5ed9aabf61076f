"""Registering: a draft and its report are a version once, named as MLflow lets it be."""

from __future__ import annotations

import pytest

from pipeline.errors import ArtifactError
from pipeline.registry import registration, versions
from tests.registry.moves import NAME, alias, submit
from tests.registry.reports import TARGET, make_draft, make_report


def test_a_target_with_a_dot_in_its_name_is_registered(recorder, tmp_path):
    """MLflow lets a registered model have one, and not the drafts of its versions."""
    target = {**TARGET, "id": "Qwen3-1.7B"}
    name = versions.model_name(target["id"], "dspark")
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", target=target), target=target)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        version = registration.register(recorder, lambda: run, name, tmp_path / "draft", tmp_path / "report")
    assert str(recorder.client.get_model_version_by_alias(name, "challenger").version) == version


def test_a_registered_draft_is_a_challenger_with_its_numbers(recorder, tmp_path):
    version = submit(recorder, tmp_path, b"one")
    got = recorder.client.get_model_version(NAME, version)
    assert alias(recorder, "challenger") == version
    assert got.tags["report.speedup"] == "1.5"
    assert got.tags["target.weight_digest"] == "w" * 64
    model = recorder.client.get_logged_model(got.tags["model_id"])
    assert (model.status, model.model_type) == ("READY", "draft")
    assert {m.key: m.value for m in model.metrics}["tau"] == 2.3


def test_registering_the_same_again_gives_the_same_version(recorder, tmp_path):
    first = submit(recorder, tmp_path, b"one")
    with recorder.stage(recorder.parent("demo"), "register") as run:
        assert registration.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report") == first
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", b"one"), speedup=1.6)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        assert registration.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report") != first


def test_a_report_of_another_draft_is_not_registered(recorder, tmp_path):
    make_draft(tmp_path / "draft", b"one")
    make_report(tmp_path / "report", make_draft(tmp_path / "other", b"two"))
    with (
        recorder.stage(recorder.parent("demo"), "register") as run,
        pytest.raises(ArtifactError, match="draft_digest"),
    ):
        registration.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report")
    assert recorder.client.search_registered_models() == []
