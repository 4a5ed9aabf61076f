"""Versions of a draft: what their model is called, which one a number or alias means, and its draft on this machine.

One registered model per (target, draft family). A version's aliases: `challenger` (registered last), `champion` (what
serves), `previous` (what served before it). Serve the resolved version that `champion` returns, never the alias.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.artifact import Manifest, load
from pipeline.errors import ArtifactError, DraftlineError, UnknownVersion
from pipeline.lock import locked
from pipeline.registry.recorder import Recorder

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


def champion(recorder: Recorder, name: str, cache_dir: Path | str) -> DraftVersion:
    """Resolves the champion and brings its draft to this machine (once per digest).

    Raises:
        DraftlineError: no champion. ArtifactError: the stored draft is not the one that was registered.
    """
    version = by_alias(recorder, name, CHAMPION)
    if version is None:
        raise DraftlineError(f"{name} has no champion. Register a draft and promote it first.")
    return fetch(recorder, version, cache_dir)


def lookup(recorder: Recorder, name: str, which: str, cache_dir: Path | str) -> DraftVersion:
    """Resolves a version by its number or alias and brings its draft to this machine (once per digest).

    Raises:
        UnknownVersion: no such version. ArtifactError: the stored draft is not the one that was registered.
    """
    return fetch(recorder, resolve(recorder, name, which), cache_dir)


def version_of(recorder: Recorder, name: str, digest: str) -> str | None:
    """The number of a version of the draft with this digest, if there is one."""
    return with_tags(recorder, name, {"draft_digest": digest})


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


def resolve(recorder: Recorder, name: str, which: str) -> ModelVersion:
    """A version by its number or alias.

    Raises:
        UnknownVersion: no such version; it names those there are.
    """
    if not which.isdigit():
        found = by_alias(recorder, name, which)
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


def by_alias(recorder: Recorder, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias names now; None where it names none, or there is no such model."""
    try:
        return recorder.client.get_model_version_by_alias(name, alias)
    except MlflowException as e:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def is_named(recorder: Recorder, name: str, alias: str, version: ModelVersion | None) -> bool:
    """Whether an alias names this version now; None: whether it names none."""
    now = by_alias(recorder, name, alias)
    return (now and str(now.version)) == (version and str(version.version))


def with_tags(recorder: Recorder, name: str, tags: dict[str, str]) -> str | None:
    """The number of a version that has these tags, if there is one."""
    query = " and ".join([f"name = '{name}'", *(f"tags.{k} = '{v}'" for k, v in tags.items())])
    found = recorder.client.search_model_versions(query)
    return str(found[0].version) if found else None


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
