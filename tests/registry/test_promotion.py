"""The champion: made by the gate, kept where it refuses or another came between, rolled back."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from pipeline.errors import DraftlineError, UnknownVersion
from pipeline.registry import promotion, registration, versions
from pipeline.registry.gate import PromotionRefused
from tests.registry.moves import NAME, alias, promote, submit
from tests.registry.reports import TARGET, Policy, comparison, make_draft, make_report


def champion_weights(recorder, folder: Path) -> bytes:
    return (versions.champion(recorder, NAME, folder / "cache").draft_dir / "model.safetensors").read_bytes()


def test_promotion_moves_champion_and_keeps_previous_and_rollback_undoes_it(recorder, tmp_path):
    numbered = []
    for i, speedup in enumerate((1.5, 1.6, 1.7)):
        numbers = {"speedup": speedup, "low": speedup - 0.02, "high": speedup + 0.02}
        numbered.append(submit(recorder, tmp_path / str(i), b"%d" % i, **numbers))
        decision, run = promote(recorder)
        decision.require()
        assert alias(recorder, "champion") == numbered[i]
        assert alias(recorder, "challenger") is None
        got = recorder.client.get_model_version(NAME, numbered[i])
        assert got.tags["verdict"] == "promote"
        assert "> 1" in got.tags["gate.speedup_low"]
        assert "decision.json" in [a.path for a in recorder.client.list_artifacts(run.run_id)]
    assert alias(recorder, "previous") == numbered[1]
    assert champion_weights(recorder, tmp_path) == b"2"

    assert promotion.rollback(recorder, NAME) == numbered[1]
    assert (alias(recorder, "champion"), alias(recorder, "previous")) == (numbered[1], numbered[0])
    assert champion_weights(recorder, tmp_path) == b"1"
    assert promotion.rollback(recorder, NAME) == numbered[0]
    with pytest.raises(DraftlineError, match="no previous champion"):
        promotion.rollback(recorder, NAME)
    assert alias(recorder, "champion") == numbered[0]


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
            assert registration.register(recorder, unused, NAME, folder / "draft", folder / "report") == version
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
        registration.register(recorder, lambda: run, NAME, tmp_path / "b" / "draft", tmp_path / "b" / "report")
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
        registration.register(recorder, lambda: run, NAME, folder / "draft", folder / "report")
    assert promote(recorder, ratio=ratio)[0].promoted is promoted


def test_the_stored_report_decides_not_a_later_file(recorder, tmp_path):
    submit(recorder, tmp_path, b"one", exact_greedy=False)
    make_report(tmp_path / "report", make_draft(tmp_path / "draft", b"one"))
    assert not promote(recorder)[0].promoted


def test_without_challenger_or_champion_the_remedy_is_named(recorder, tmp_path):
    with pytest.raises(DraftlineError, match="Register a draft first"):
        promote(recorder)
    with pytest.raises(DraftlineError, match="promote it first"):
        versions.champion(recorder, NAME, tmp_path)


def test_mlflow_global_state_and_the_working_directory_are_untouched(recorder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    submit(recorder, tmp_path, b"one")
    promote(recorder)
    versions.champion(recorder, NAME, tmp_path / "cache")
    assert mlflow.active_run() is None
    assert list(elsewhere.iterdir()) == []
