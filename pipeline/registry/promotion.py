"""Promoting: the gate decides which version is champion, and a champion is rolled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import DraftlineError
from pipeline.identity import same_target
from pipeline.registry.gate import GateDecision, GatePolicy, decide
from pipeline.registry.recorder import Begin, Recorder, tagged_identity
from pipeline.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, by_alias, is_named, resolve, stored_report

Compare = Callable[[ModelVersion, ModelVersion], dict[str, Any]]
"""Measures (challenger, champion) side by side; returns a `comparison.json` (pipeline/evaluation/stages.py)."""


def promote(
    recorder: Recorder, begin: Begin, name: str, policy: GatePolicy, compare: Compare, version: str | None = None
) -> GateDecision:
    """Lets the gate decide on a version; moves `champion` to it, or leaves everything as it was.

    The decision goes onto the version (tags) and the run (artifact `decision.json`, metrics), unless the version tells
    of the same one already. Call `decision.require()` afterwards to fail when it was refused.

    Args:
        begin: gives the promote stage's run.
        compare: measures challenger and champion side by side; called when there is a champion of the same target
            with another draft.
        version: number of the challenger, as `register` returned it; None takes whichever has the alias now, without
            one the champion itself, which is held to the bounds again.
    Raises:
        DraftlineError: there is neither, or the champion changed meanwhile (then nothing was moved).
        UnknownVersion: no such version. ArtifactError: a stored report or draft was altered.
    """
    client = recorder.client
    champion = by_alias(recorder, name, CHAMPION)
    if version is not None:
        challenger: ModelVersion | None = resolve(recorder, name, version)
    else:
        challenger = by_alias(recorder, name, CHALLENGER) or champion
    if challenger is None:
        raise DraftlineError(f"{name} has no challenger. Register a draft first (the register stage).")
    if back := challenger.tags.get("rolled_back_to"):
        raise DraftlineError(
            f"Version {challenger.version} of {name} was champion and was rolled back (to version {back}); it is not "
            "promoted again by itself. Register another draft, or delete the version's tag rolled_back_to."
        )
    report = stored_report(recorder, challenger)
    comparison, target = None, None
    if champion is not None and champion.tags["draft_digest"] != challenger.tags["draft_digest"]:
        target = tagged_identity(champion.tags)
        if same_target(target, report.get("target")):
            comparison = compare(challenger, champion)
    decision = decide(report, policy, champion_target=target, comparison=comparison)
    moves = decision.promoted and (champion is None or champion.version != challenger.version)
    tags: dict[str, str] = {"verdict": decision.verdict}
    tags |= {f"gate.{c.name}": f"{c.value} {c.bound} {'ok' if c.passed else 'FAILED'}" for c in decision.reasons}
    settled = not moves and not (decision.promoted and is_named(recorder, name, CHALLENGER, challenger))
    if settled and all(challenger.tags.get(k) == v for k, v in tags.items()):
        return decision
    run = begin()
    record = {**decision.as_dict(), "model": name, "challenger": challenger.version, "comparison": comparison}
    record["champion"] = champion.version if champion else None
    run.log_dict(record, "decision.json")
    run.log_metrics({f"gate.{c.name}": float(c.value) for c in decision.reasons if not isinstance(c.value, str)})
    run.tag({"model": name, "version": challenger.version, "verdict": decision.verdict})
    # Comparing takes minutes, in which others promote. MLflow can't compare and set in one, so as late as can be.
    if decision.promoted and not is_named(recorder, name, CHAMPION, champion):
        raise DraftlineError(
            f"The champion of {name} changed while version {challenger.version} was judged against "
            f"{f'version {champion.version}' if champion else 'none'}; nothing was moved. Promote again."
        )
    tags["decision_run_id"] = run.run_id
    if moves and champion is not None:
        tags["supersedes"] = str(champion.version)
    for key, value in tags.items():
        client.set_model_version_tag(name, challenger.version, key, value)
    if moves:
        # In this order: whenever this stops between two lines, a champion serves and can be rolled back.
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, champion.version)
        client.set_registered_model_alias(name, CHAMPION, challenger.version)
    if decision.promoted and is_named(recorder, name, CHALLENGER, challenger):  # another's challenger waits for its own
        client.delete_registered_model_alias(name, CHALLENGER)
    return decision


def rollback(recorder: Recorder, name: str) -> str:
    """Makes the previous champion champion again; `previous` becomes the one that it had replaced, if any.

    Returns:
        the version that is champion now.
    Raises:
        DraftlineError: nothing to go back to.
    """
    client = recorder.client
    previous, champion = by_alias(recorder, name, PREVIOUS), by_alias(recorder, name, CHAMPION)
    if previous is None or champion is None:
        raise DraftlineError(f"{name} has no previous champion to roll back to.")
    client.set_model_version_tag(name, champion.version, "rolled_back_to", str(previous.version))
    client.set_registered_model_alias(name, CHAMPION, previous.version)
    older = previous.tags.get("supersedes")
    if older:
        client.set_registered_model_alias(name, PREVIOUS, older)
    else:
        client.delete_registered_model_alias(name, PREVIOUS)
    return str(previous.version)
