"""Versions: registered once, promoted by the gate, rolled back, fetched with their digests checked."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from pipeline.errors import ArtifactError, DraftlineError, UnknownVersion
from pipeline.registry import promotion
from pipeline.registry.gate import PromotionRefused
from tests.registry.reports import TARGET, Policy, comparison, make_draft, make_report

NAME = "draftline-tiny-dspark"


def submit(recorder, folder: Path, weights: bytes, **numbers) -> str:
    draft = make_draft(folder / "draft", weights)
    make_report(folder / "report", draft, **numbers)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        return promotion.register(recorder, lambda: run, NAME, folder / "draft", folder / "report")


def promote(recorder, policy=None, ratio=1.0, version=None, meanwhile=lambda: None):
    """Promotes; challenger and champion measured side by side give `ratio`, to 1 %, and `meanwhile` happens."""

    def compare(challenger, champion):
        assert challenger.version != champion.version
        meanwhile()
        return comparison(ratio, ratio - 0.01, ratio + 0.01, draft=challenger.tags["draft_digest"])

    with recorder.stage(recorder.parent("demo"), "promote") as run:
        return promotion.promote(recorder, lambda: run, NAME, policy or Policy(), compare, version), run


def alias(recorder, which: str) -> str | None:
    version = recorder.client.get_registered_model(NAME).aliases.get(which)
    return None if version is None else str(version)


def champion_weights(recorder, folder: Path) -> bytes:
    return (promotion.champion(recorder, NAME, folder / "cache").draft_dir / "model.safetensors").read_bytes()


def test_model_names_follow_target_and_family():
    assert promotion.model_name("smollm2-135m", "dspark") == "draftline-smollm2-135m-dspark"
    assert promotion.model_name("Qwen/Qwen3-4B", "dspark") == "draftline-qwen-qwen3-4b-dspark"
    assert promotion.model_name("Qwen3-1.7B", "dspark") == "draftline-qwen3-1-7b-dspark"


def test_a_target_with_a_dot_in_its_name_is_registered(recorder, tmp_path):
    """MLflow lets a registered model have one, and not the drafts of its versions."""
    target = {**TARGET, "id": "Qwen3-1.7B"}
    name = promotion.model_name(target["id"], "dspark")
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", target=target), target=target)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        version = promotion.register(recorder, lambda: run, name, tmp_path / "draft", tmp_path / "report")
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
        assert promotion.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report") == first
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", b"one"), speedup=1.6)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        assert promotion.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report") != first


def test_promotion_moves_champion_and_keeps_previous_and_rollback_undoes_it(recorder, tmp_path):
    versions = []
    for i, speedup in enumerate((1.5, 1.6, 1.7)):
        numbers = {"speedup": speedup, "low": speedup - 0.02, "high": speedup + 0.02}
        versions.append(submit(recorder, tmp_path / str(i), b"%d" % i, **numbers))
        decision, run = promote(recorder)
        decision.require()
        assert alias(recorder, "champion") == versions[i]
        assert alias(recorder, "challenger") is None
        got = recorder.client.get_model_version(NAME, versions[i])
        assert got.tags["verdict"] == "promote"
        assert "> 1" in got.tags["gate.speedup_low"]
        assert "decision.json" in [a.path for a in recorder.client.list_artifacts(run.run_id)]
    assert alias(recorder, "previous") == versions[1]
    assert champion_weights(recorder, tmp_path) == b"2"

    assert promotion.rollback(recorder, NAME) == versions[1]
    assert (alias(recorder, "champion"), alias(recorder, "previous")) == (versions[1], versions[0])
    assert champion_weights(recorder, tmp_path) == b"1"
    assert promotion.rollback(recorder, NAME) == versions[0]
    with pytest.raises(DraftlineError, match="no previous champion"):
        promotion.rollback(recorder, NAME)
    assert alias(recorder, "champion") == versions[0]


def test_a_refused_challenger_leaves_the_champion(recorder, tmp_path):
    first = submit(recorder, tmp_path / "a", b"a")
    promote(recorder)[0].require()
    second = submit(recorder, tmp_path / "b", b"b", speedup=1.2, speedup_low=1.1, speedup_high=1.3)
    decision, run = promote(recorder, ratio=0.8)
    with pytest.raises(PromotionRefused, match="over_champion_low"):
        decision.require()
    assert alias(recorder, "champion") == first
    assert alias(recorder, "challenger") == second
    assert recorder.client.get_model_version(NAME, second).tags["verdict"] == "refuse"
    assert recorder.client.get_run(run.run_id).data.metrics["gate.speedup_low"] == pytest.approx(1.1)


def test_a_version_is_promoted_by_its_number_whoever_is_challenger(recorder, tmp_path):
    """Two pipelines of one model: the one's draft was never measured where the other promotes."""
    first = submit(recorder, tmp_path / "a", b"a")
    promote(recorder)
    second, third = (submit(recorder, tmp_path / n, n.encode()) for n in "bc")
    decision, run = promote(recorder, version=second)
    assert decision.promoted and recorder.client.get_run(run.run_id).data.tags["version"] == second
    assert [alias(recorder, a) for a in ("champion", "previous", "challenger")] == [second, first, third]
    assert "verdict" not in recorder.client.get_model_version(NAME, third).tags
    assert promotion.promote(recorder, unused, NAME, Policy(), unused, second).promoted
    assert alias(recorder, "challenger") == third
    with pytest.raises(UnknownVersion, match="no version '9'; there are: 1, 2, 3, "):
        promote(recorder, version="9")


def test_a_challenger_that_is_registered_meanwhile_waits_for_its_own_turn(recorder, tmp_path):
    first = submit(recorder, tmp_path / "a", b"a")
    promote(recorder)
    second, later = submit(recorder, tmp_path / "b", b"b"), []
    assert promote(recorder, meanwhile=lambda: later.append(submit(recorder, tmp_path / "c", b"c")))[0].promoted
    assert [alias(recorder, a) for a in ("champion", "previous", "challenger")] == [second, first, *later]


def test_nothing_moves_where_the_champion_changed_meanwhile(recorder, tmp_path):
    one, two, three = (submit(recorder, tmp_path / n, n.encode()) for n in "abc")
    promote(recorder, version=one)

    def other_job():
        promote(recorder, version=three)

    said = f"champion of {NAME} changed while version {two} was judged against version {one}; .*Promote again"
    with pytest.raises(DraftlineError, match=said):
        promote(recorder, version=two, meanwhile=other_job)
    assert [alias(recorder, a) for a in ("champion", "previous", "challenger")] == [three, one, None]
    assert "verdict" not in recorder.client.get_model_version(NAME, two).tags
    assert promote(recorder, version=two)[0].promoted
    assert [alias(recorder, a) for a in ("champion", "previous")] == [two, three]


def test_a_first_champion_gives_way_to_one_that_was_first_meanwhile(recorder, tmp_path):
    one, two = (submit(recorder, tmp_path / n, n.encode()) for n in "ab")
    with recorder.stage(recorder.parent("demo"), "promote") as run:

        def begin():
            promote(recorder, version=two)
            return run

        with pytest.raises(DraftlineError, match="judged against none; nothing was moved"):
            promotion.promote(recorder, begin, NAME, Policy(), unused, one)
    assert alias(recorder, "champion") == two


def test_promoting_the_champion_again_changes_nothing(recorder, tmp_path):
    version = submit(recorder, tmp_path, b"one")
    promote(recorder)
    assert submit(recorder, tmp_path / "again", b"one") == version
    decision, _ = promote(recorder)
    assert decision.promoted
    assert (alias(recorder, "champion"), alias(recorder, "previous")) == (version, None)


def test_the_champions_own_report_must_still_pass(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    version = submit(recorder, tmp_path / "again", b"one")
    decision, _ = promote(recorder, Policy(min_tau=9.0))
    assert not decision.promoted
    assert alias(recorder, "champion") == version


def unused(*_):
    pytest.fail("nothing was new, and a run was opened")


def test_nothing_new_opens_no_run_until_a_bound_changes(recorder, tmp_path):
    """What a second `make demo` does, after a first champion, after its successor and after one that was refused."""
    for i, (ratio, verdict) in enumerate(((1.0, "promote"), (1.05, "promote"), (0.8, "refuse"))):
        folder, ratio_is = tmp_path / str(i), comparison(ratio, ratio - 0.01, ratio + 0.01, draft="")
        version = submit(recorder, folder, b"%d" % i)
        assert promote(recorder, ratio=ratio)[0].verdict == verdict
        before = recorder.client.get_registered_model(NAME).aliases

        def compare(challenger, _, measured=ratio_is):
            return measured | {"challenger": {"draft_digest": challenger.tags["draft_digest"]}}

        for _ in range(2):
            assert promotion.register(recorder, unused, NAME, folder / "draft", folder / "report") == version
            assert promotion.promote(recorder, unused, NAME, Policy(), compare).verdict == verdict
        assert recorder.client.get_registered_model(NAME).aliases == before
    # The champion holds its own under other bounds only: that is told, once.
    recorder.client.delete_registered_model_alias(NAME, "challenger")
    decision, run = promote(recorder, Policy(min_tau=9.0))
    assert [c.name for c in decision.failed] == ["tau"]
    assert recorder.client.get_run(run.run_id).data.tags["verdict"] == "refuse"
    assert not promotion.promote(recorder, unused, NAME, Policy(min_tau=9.0), unused).promoted
    assert promote(recorder)[0].promoted
    assert alias(recorder, "champion") == "2"


def test_the_champions_draft_measured_again_needs_no_comparison(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    version = submit(recorder, tmp_path / "again", b"one", speedup=1.6)
    with recorder.stage(recorder.parent("demo"), "promote") as run:
        decision = promotion.promote(
            recorder, lambda: run, NAME, Policy(), lambda *_: pytest.fail("compared with itself")
        )
    assert decision.promoted
    assert alias(recorder, "champion") == version


def test_a_draft_of_another_target_is_refused_unmeasured(recorder, tmp_path):
    first = submit(recorder, tmp_path / "a", b"a")
    promote(recorder)
    other = {**TARGET, "revision": "r2"}
    draft = make_draft(tmp_path / "b" / "draft", b"b", target=other)
    make_report(tmp_path / "b" / "report", draft, draft_digest=draft.digest, target=other)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        promotion.register(recorder, lambda: run, NAME, tmp_path / "b" / "draft", tmp_path / "b" / "report")
    with recorder.stage(recorder.parent("demo"), "promote") as run:
        decision = promotion.promote(recorder, lambda: run, NAME, Policy(), lambda *_: pytest.fail("targets differ"))
    assert [c.name for c in decision.failed] == ["target.revision"]
    assert alias(recorder, "champion") == first


@pytest.mark.parametrize(("ratio", "promoted"), [(1.0, True), (0.8, False)])
def test_a_draft_of_the_same_target_elsewhere_is_compared(recorder, tmp_path, ratio, promoted):
    submit(recorder, tmp_path / "a", b"a")
    promote(recorder)
    moved, folder = {**TARGET, "id": "copy"}, tmp_path / "b"
    make_report(folder / "report", make_draft(folder / "draft", b"b", target=moved), target=moved)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        promotion.register(recorder, lambda: run, NAME, folder / "draft", folder / "report")
    assert promote(recorder, ratio=ratio)[0].promoted is promoted


def test_the_stored_report_decides_not_a_later_file(recorder, tmp_path):
    submit(recorder, tmp_path, b"one", exact_greedy=False)
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", b"one"))
    assert not promote(recorder)[0].promoted


def test_a_report_of_another_draft_is_not_registered(recorder, tmp_path):
    make_draft(tmp_path / "draft", b"one")
    make_report(tmp_path / "report", make_draft(tmp_path / "other", b"two"))
    with (
        recorder.stage(recorder.parent("demo"), "register") as run,
        pytest.raises(ArtifactError, match="draft_digest"),
    ):
        promotion.register(recorder, lambda: run, NAME, tmp_path / "draft", tmp_path / "report")
    assert recorder.client.search_registered_models() == []


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
        promotion.champion(recorder, NAME, tmp_path / "cache")
    assert all(p.suffix == ".lock" for p in (tmp_path / "cache" / "drafts").iterdir())


def test_a_draft_replaced_with_its_manifest_is_refused(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    make_draft(stored_file(recorder, "champion").parent, b"two")
    with pytest.raises(ArtifactError, match="not the one that was registered"):
        promotion.champion(recorder, NAME, tmp_path / "cache")


def test_a_cached_draft_is_used_while_whole_and_fetched_again_when_damaged(recorder, tmp_path):
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    got = promotion.champion(recorder, NAME, tmp_path / "cache")
    (got.draft_dir / "model.safetensors").write_bytes(b"xxx")
    again = promotion.champion(recorder, NAME, tmp_path / "cache")
    assert (again.draft_dir / "model.safetensors").read_bytes() == b"one"
    stored_file(recorder, "champion").unlink()
    assert promotion.champion(recorder, NAME, tmp_path / "cache").version == got.version


def test_processes_that_want_a_champion_at_once_fetch_it_once(recorder, tmp_path, monkeypatch):
    """Each would take away what another had put there, under the feet of who reads it."""
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    download, fetched, both = promotion._download, [], threading.Barrier(2, timeout=1)

    def slow(*args):
        fetched.append(args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()  # what races is here together; what waits its turn lets this run out
        return download(*args)

    monkeypatch.setattr(promotion, "_download", slow)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda _: promotion.champion(recorder, NAME, tmp_path / "cache"), range(2)))
    assert len(fetched) == 1
    assert got[0] == got[1] and (got[0].draft_dir / "model.safetensors").read_bytes() == b"one"


def test_without_challenger_or_champion_the_remedy_is_named(recorder, tmp_path):
    with pytest.raises(DraftlineError, match="Register a draft first"):
        promote(recorder)
    with pytest.raises(DraftlineError, match="promote it first"):
        promotion.champion(recorder, NAME, tmp_path)


def test_mlflow_global_state_and_the_working_directory_are_untouched(recorder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    promotion.champion(recorder, NAME, tmp_path / "cache")
    assert mlflow.active_run() is None
    assert list(elsewhere.iterdir()) == []


def test_a_version_is_found_by_number_and_by_alias(recorder, tmp_path):
    first = submit(recorder, tmp_path / "1", b"one")
    promote(recorder)
    second = submit(recorder, tmp_path / "2", b"two")
    for which, weights in ((first, b"one"), ("champion", b"one"), (second, b"two"), ("challenger", b"two")):
        got = promotion.lookup(recorder, NAME, which, tmp_path / "cache")
        assert (got.draft_dir / "model.safetensors").read_bytes() == weights
    for unknown in ("99", "campion"):
        with pytest.raises(DraftlineError, match=rf"no version '{unknown}'; there are: .*champion"):
            promotion.lookup(recorder, NAME, unknown, tmp_path / "cache")
