"""Versions: found by number and alias, their drafts fetched once and with their digests checked."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, DraftlineError
from pipeline.registry import versions
from tests.registry.moves import NAME, promote, submit
from tests.registry.reports import make_draft


def test_model_names_follow_target_and_family():
    assert versions.model_name("smollm2-135m", "dspark") == "draftline-smollm2-135m-dspark"
    assert versions.model_name("Qwen/Qwen3-4B", "dspark") == "draftline-qwen-qwen3-4b-dspark"
    assert versions.model_name("Qwen3-1.7B", "dspark") == "draftline-qwen3-1-7b-dspark"


def test_a_version_is_found_by_number_and_by_alias(recorder, tmp_path):
    first = submit(recorder, tmp_path / "1", b"one")
    promote(recorder)
    second = submit(recorder, tmp_path / "2", b"two")
    for which, weights in ((first, b"one"), ("champion", b"one"), (second, b"two"), ("challenger", b"two")):
        got = versions.lookup(recorder, NAME, which, tmp_path / "cache")
        assert (got.draft_dir / "model.safetensors").read_bytes() == weights
    for unknown in ("99", "campion"):
        with pytest.raises(DraftlineError, match=rf"no version '{unknown}'; there are: .*champion"):
            versions.lookup(recorder, NAME, unknown, tmp_path / "cache")


def stored_file(recorder, which: str) -> Path:
    version = recorder.client.get_model_version_by_alias(NAME, which)
    model = recorder.client.get_logged_model(version.tags["model_id"])
    return Path(model.artifact_location.removeprefix("file://")) / "model.safetensors"


def test_an_altered_draft_is_refused(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    file = stored_file(recorder, "champion")
    file.write_bytes(b"eno")
    with pytest.raises(ArtifactError, match="altered"):
        versions.champion(recorder, NAME, tmp_path / "cache")
    assert all(p.suffix == ".lock" for p in (tmp_path / "cache" / "drafts").iterdir())


def test_a_draft_replaced_with_its_manifest_is_refused(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    make_draft(stored_file(recorder, "champion").parent, b"two")
    with pytest.raises(ArtifactError, match="not the one that was registered"):
        versions.champion(recorder, NAME, tmp_path / "cache")


def test_a_cached_draft_is_used_while_whole_and_fetched_again_when_damaged(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    got = versions.champion(recorder, NAME, tmp_path / "cache")
    (got.draft_dir / "model.safetensors").write_bytes(b"xxx")
    again = versions.champion(recorder, NAME, tmp_path / "cache")
    assert (again.draft_dir / "model.safetensors").read_bytes() == b"one"
    stored_file(recorder, "champion").unlink()
    assert versions.champion(recorder, NAME, tmp_path / "cache").version == got.version


def test_processes_that_want_a_champion_at_once_fetch_it_once(recorder, tmp_path, monkeypatch):
    """Each would take away what another had put there, under the feet of who reads it."""
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    download, fetched, both = versions._download, [], threading.Barrier(2, timeout=1)

    def slow(*args):
        fetched.append(args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()  # what races is here together; what waits its turn lets this run out
        return download(*args)

    monkeypatch.setattr(versions, "_download", slow)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda _: versions.champion(recorder, NAME, tmp_path / "cache"), range(2)))
    assert len(fetched) == 1
    assert got[0] == got[1] and (got[0].draft_dir / "model.safetensors").read_bytes() == b"one"
