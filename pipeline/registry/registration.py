"""Registering: a draft with its report becomes a version, and the challenger.

A version is made last, when its draft and report are stored: a version that exists is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from pipeline.artifact import Manifest, code_version, load
from pipeline.errors import ArtifactError
from pipeline.registry.recorder import Begin, Recorder, flatten, identity_tags
from pipeline.registry.versions import CHALLENGER, CHAMPION, by_alias, read_report, with_tags


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
    version = with_tags(recorder, name, {k: tags[k] for k in ("draft_digest", "report_digest")})
    candidate = by_alias(recorder, name, CHALLENGER) or by_alias(recorder, name, CHAMPION)
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


def _ensure_model(recorder: Recorder, name: str) -> None:
    try:
        recorder.client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
