"""Versions of a draft: registered as challenger, promoted to champion by the gate, rolled back, looked up.

One registered model per (target, draft family). A version's aliases: `challenger` (registered last), `champion` (what
serves), `previous` (what served before it). Serve the resolved version that `champion` returns, never the alias.
A version is made last, when its draft and report are stored: a version that exists is complete.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.artifact import Manifest, code_version, load
from pipeline.errors import ArtifactError, DraftlineError, UnknownVersion
from pipeline.identity import same_target
from pipeline.lock import locked
from pipeline.registry.gate import GateDecision, GatePolicy, decide
from pipeline.registry.recorder import Recorder, StageRun, flatten, identity_tags, tagged_identity

if TYPE_CHECKING:
    from pipeline.config import PipelineConfig

CHALLENGER = "challenger"
CHAMPION = "champion"
PREVIOUS = "previous"


@dataclasses.dataclass(frozen=True)
class DraftVersion:
    """A resolved version with its draft on this machine, digests checked."""

    name: str
    version: str
    draft_dir: Path
    manifest: Manifest
    tags: dict[str, str]


Compare = Callable[[ModelVersion, ModelVersion], dict[str, Any]]
"""Measures (challenger, champion) side by side; returns a `comparison.json` (pipeline/evaluation/stages.py)."""
Begin = Callable[[], StageRun]
"""Gives the stage's run, opened at the first call: where nothing is new there is none."""


def model_name(target_id: str, family: str) -> str:
    """The registered model's name, e.g. `draftline-qwen3-1-7b-dspark`; its drafts go by it, which may have no dot."""
    slug = re.sub(r"[^a-z0-9]+", "-", target_id.lower()).strip("-")
    return f"draftline-{slug}-{family}"


def registered_name(config: PipelineConfig) -> str:
    """The registered model that every job of a configuration means; needs no run of it and no weights.

    Where the run's draft was converted, its own algorithm counts: it is not what the settings would train.
    """
    from pipeline.drafts.formats.conversion import converted_algorithm
    from pipeline.target import target_id

    if config.tracking.model_name:
        return config.tracking.model_name
    algorithm = converted_algorithm(config.run_dir / "draft") or config.draft.algorithm
    return model_name(target_id(config.target), algorithm)


def register(recorder: Recorder, begin: Begin, name: str, draft_dir: Path | str, report_dir: Path | str) -> str:
    """Stores a draft (as an MLflow LoggedModel) with its report and makes it the challenger.

    The same draft with the same report is the version that exists; where that is challenger, or champion without a
    challenger, nothing is done.

    Args:
        begin: gives the register stage's run; the report is kept under its `report/`.
        name: registered model, see `registered_name`.
    Returns:
        the version.
    Raises:
        ArtifactError: draft or report missing or altered, or the report measured another draft or target.
    """
    draft, report = load(draft_dir, "draft"), load(report_dir, "report")
    content = read_report(report_dir)
    _same_draft(draft, content, report_dir)
    client = recorder.client
    tags = _version_tags(draft, report, content)
    version = _find(recorder, name, {k: tags[k] for k in ("draft_digest", "report_digest")})
    candidate = _by_alias(recorder, name, CHALLENGER) or _by_alias(recorder, name, CHAMPION)
    if version is not None and candidate is not None and version == str(candidate.version):
        return version
    run = begin()
    run.tag({k: tags[k] for k in ("draft_digest", "report_digest")})
    if version is None:
        run.log_artifact(report_dir, "report")
        model = client.create_logged_model(
            recorder.experiment_id,
            name=name,
            source_run_id=run.run_id,
            tags=tags,
            params={k: v[:250] for k, v in flatten(draft.config).items()},
            model_type="draft",
        )
        try:
            client.log_model_artifacts(model.model_id, str(draft_dir))
        except BaseException:
            client.finalize_logged_model(model.model_id, "FAILED")
            raise
        client.finalize_logged_model(model.model_id, "READY")
        for key, value in _numbers(content).items():
            client.log_metric(run.run_id, key, value, model_id=model.model_id)
        _ensure_model(recorder, name)
        created = client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run.run_id,
            # The version's own model_id comes back empty from open-source servers, hence the tag.
            tags={**tags, "model_id": model.model_id, "report_run_id": run.run_id},
            model_id=model.model_id,
        )
        version = str(created.version)
    client.set_registered_model_alias(name, CHALLENGER, version)
    run.tag({"model": name, "version": version})
    return version


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
    champion = _by_alias(recorder, name, CHAMPION)
    if version is not None:
        challenger: ModelVersion | None = _resolve(recorder, name, version)
    else:
        challenger = _by_alias(recorder, name, CHALLENGER) or champion
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
    settled = not moves and not (decision.promoted and _is(recorder, name, CHALLENGER, challenger))
    if settled and all(challenger.tags.get(k) == v for k, v in tags.items()):
        return decision
    run = begin()
    record = {**decision.as_dict(), "model": name, "challenger": challenger.version, "comparison": comparison}
    record["champion"] = champion.version if champion else None
    run.log_dict(record, "decision.json")
    run.log_metrics({f"gate.{c.name}": float(c.value) for c in decision.reasons if not isinstance(c.value, str)})
    run.tag({"model": name, "version": challenger.version, "verdict": decision.verdict})
    # Comparing takes minutes, in which others promote. MLflow can't compare and set in one, so as late as can be.
    if decision.promoted and not _is(recorder, name, CHAMPION, champion):
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
    if decision.promoted and _is(recorder, name, CHALLENGER, challenger):  # another's challenger waits for its own
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
    previous, champion = _by_alias(recorder, name, PREVIOUS), _by_alias(recorder, name, CHAMPION)
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


def champion(recorder: Recorder, name: str, cache_dir: Path | str) -> DraftVersion:
    """Resolves the champion and brings its draft to this machine (once per digest).

    Raises:
        DraftlineError: no champion. ArtifactError: the stored draft is not the one that was registered.
    """
    version = _by_alias(recorder, name, CHAMPION)
    if version is None:
        raise DraftlineError(f"{name} has no champion. Register a draft and promote it first.")
    return fetch(recorder, version, cache_dir)


def lookup(recorder: Recorder, name: str, which: str, cache_dir: Path | str) -> DraftVersion:
    """Resolves a version by its number or alias and brings its draft to this machine (once per digest).

    Raises:
        UnknownVersion: no such version. ArtifactError: the stored draft is not the one that was registered.
    """
    return fetch(recorder, _resolve(recorder, name, which), cache_dir)


def version_of(recorder: Recorder, name: str, digest: str) -> str | None:
    """The number of a version of the draft with this digest, if there is one."""
    return _find(recorder, name, {"draft_digest": digest})


def fetch(recorder: Recorder, version: ModelVersion, cache_dir: Path | str) -> DraftVersion:
    """Brings a version's draft to this machine (once per digest).

    Raises:
        ArtifactError: the stored draft is not the one that was registered.
    """
    name, digest = str(version.name), version.tags["draft_digest"]
    place = Path(cache_dir).absolute() / "drafts" / digest[:16]
    manifest = _intact(place, digest)
    if manifest is None:
        # Two processes that both fetched would each take away what the other had put there.
        with locked(place.with_name(f".{place.name}.lock")):
            manifest = _intact(place, digest) or _bring(recorder, version, place, digest)
    return DraftVersion(name, str(version.version), place, manifest, dict(version.tags))


def stored_report(recorder: Recorder, version: ModelVersion) -> dict[str, Any]:
    """The report a version was registered with.

    Raises:
        ArtifactError: it was altered since.
    """
    with tempfile.TemporaryDirectory() as aside:
        got = Path(_download(recorder, f"runs:/{version.tags['report_run_id']}/report", aside))
        manifest = load(got, "report")
        if manifest.digest != version.tags["report_digest"]:
            raise ArtifactError(
                f"The stored report of {version.name} version {version.version} is not the one it was registered with "
                f"(digest {manifest.digest[:16]}, registered {version.tags['report_digest'][:16]}). Evaluate and "
                "register the draft again."
            )
        return read_report(got)


def read_report(report_dir: Path | str) -> dict[str, Any]:
    """report.json of a report artifact.

    Raises:
        ArtifactError: missing or not JSON.
    """
    file = Path(report_dir) / "report.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{file} can't be read ({e}). Run evaluate again.") from None


def _same_draft(draft: Manifest, content: dict[str, Any], report_dir: Path | str) -> None:
    for field, ours in (("draft_digest", draft.digest), ("target", draft.target)):
        if content.get(field) != ours:
            raise ArtifactError(
                f"The report at {report_dir} measured another draft: its {field} is {content.get(field)!r}, the "
                f"draft's is {ours!r}. Evaluate this draft first."
            )


def _version_tags(draft: Manifest, report: Manifest, content: dict[str, Any]) -> dict[str, str]:
    tags = {
        "draft_digest": draft.digest,
        "report_digest": report.digest,
        "evaluation_set_digest": str(content.get("evaluation_set_digest", "")),
        "code_version": code_version(),
        **identity_tags(draft.target or {}),
        **{f"input.{name}": digest for name, digest in draft.inputs.items()},
    }
    return tags | {f"report.{key}": f"{value:.6g}" for key, value in _numbers(content).items()}


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    headline = content.get("headline", {})
    return {k: float(v) for k, v in headline.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _find(recorder: Recorder, name: str, tags: dict[str, str]) -> str | None:
    query = " and ".join([f"name = '{name}'", *(f"tags.{k} = '{v}'" for k, v in tags.items())])
    found = recorder.client.search_model_versions(query)
    return str(found[0].version) if found else None


def _ensure_model(recorder: Recorder, name: str) -> None:
    try:
        recorder.client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _resolve(recorder: Recorder, name: str, which: str) -> ModelVersion:
    """A version by its number or alias; raises UnknownVersion, which names those there are."""
    if not which.isdigit():
        found = _by_alias(recorder, name, which)
    else:
        try:
            found = recorder.client.get_model_version(name, which)
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None
    if found is None:
        there = sorted(str(v.version) for v in recorder.client.search_model_versions(f"name = '{name}'"))
        if there:
            there += recorder.client.get_registered_model(name).aliases
        raise UnknownVersion(f"{name} has no version {which!r}; there are: {', '.join(there) or 'none'}.")
    return found


def _is(recorder: Recorder, name: str, alias: str, version: ModelVersion | None) -> bool:
    """Whether an alias names this version now; None: whether it names none."""
    now = _by_alias(recorder, name, alias)
    return (now and str(now.version)) == (version and str(version.version))


def _by_alias(recorder: Recorder, name: str, alias: str) -> ModelVersion | None:
    try:
        return recorder.client.get_model_version_by_alias(name, alias)
    except MlflowException as e:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _download(recorder: Recorder, uri: str, into: str) -> str:
    try:
        return mlflow.artifacts.download_artifacts(
            artifact_uri=uri, dst_path=into, tracking_uri=recorder.uri, registry_uri=recorder.uri
        )
    except (MlflowException, OSError) as e:
        first = str(e).splitlines()[0]
        raise ArtifactError(f"{uri} can't be fetched from {recorder.uri}: {first}. Register the draft again.") from None


def _bring(recorder: Recorder, version: ModelVersion, place: Path, digest: str) -> Manifest:
    """Downloads a version's draft to `place`, checked before it gets there; what was there goes away."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".download-") as aside:
        what = f"{version.name} version {version.version}"
        # Not models:/<id>: MLflow resolves that through its global tracking URI, whatever is passed.
        got = Path(_download(recorder, str(version.source), aside))
        try:
            manifest = load(got, "draft")
        except ArtifactError as e:
            raise ArtifactError(f"The stored draft of {what} is damaged: {e} Roll back or register again.") from None
        if manifest.digest != digest:
            raise ArtifactError(
                f"The stored draft of {what} is not the one that was registered: its digest is "
                f"{manifest.digest[:16]}, registered was {digest[:16]}. Roll back or register again."
            )
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(got, aside_copy := Path(aside) / "whole")
        aside_copy.rename(place)
    return manifest


def _intact(place: Path, digest: str) -> Manifest | None:
    try:
        manifest = load(place, "draft")
    except (ArtifactError, OSError):  # an OSError where another process takes a damaged one away meanwhile
        return None
    return manifest if manifest.digest == digest else None
