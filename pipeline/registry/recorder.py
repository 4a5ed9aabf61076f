"""The recorder: MLflow runs by explicit id, one parent per pipeline run and one child per stage.

    recorder = Recorder(None, "draftline", output_root)            # sqlite under output_root; or a server's URI
    parent = recorder.parent("demo", {"target.id": "smollm2-135m"})
    with recorder.stage(parent, "train", {"draft": "dspark"}) as run:
        run.log_config(config)
        run.log_metrics({"loss": 2.0}, step=10)

Nothing here uses MLflow's global active run: it leaks between the tasks of a reused Ray worker. Make a recorder in
the driver (or in Ray Train's controller) only; workers have other working directories and would race on sqlite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# A tool that runs in other people's clusters doesn't report home from them; set it to false to allow it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # made at import
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException

from pipeline.artifact import code_version
from pipeline.errors import DraftlineError
from pipeline.lock import locked

MAX_PARAM = 6000
MAX_BATCH = 100
MAX_DIGEST = 32
PIPELINE = "draftline.pipeline"
STAGE = "draftline.stage"
PARENT = "mlflow.parentRunId"
ARTIFACT = "artifact_digest"

_KILLED_CODES = (15, 130, 143)  # a signal's exit: Ray's own handler exits with 15, shells say 128 + n


def sqlite_uri(root: Path | str) -> str:
    """The default store's URI: `mlflow/mlflow.db` under an output root, absolute (a relative one forks)."""
    return f"sqlite:///{Path(root).absolute() / 'mlflow' / 'mlflow.db'}"


class Recorder:
    """An MLflow experiment: where runs, drafts and decisions are kept.

    Args:
        uri: `http(s)://...` of a server, `sqlite:///` with an absolute path, or None or "" for `sqlite_uri(root)`.
        experiment: name; made if it doesn't exist.
        root: output root, needed when `uri` is empty.
    Raises:
        DraftlineError: a relative sqlite path, another kind of URI, or a server that doesn't answer.
    """

    def __init__(self, uri: str | None, experiment: str, root: Path | str | None = None) -> None:
        if not uri:
            if root is None:
                raise DraftlineError("tracking.uri is not set and there is no output root to keep a store in. Set one.")
            uri = sqlite_uri(root)
        self.uri = uri
        if uri.startswith("sqlite:///"):
            store = Path(uri.removeprefix("sqlite:///"))
            if not store.is_absolute():
                raise DraftlineError(
                    f"tracking.uri={uri!r} is relative to a working directory that differs between processes. "
                    f"Use an absolute path: {f'sqlite:///{store.absolute()}'!r}."
                )
            # Two processes that find an empty database both migrate it, and one of them fails.
            with locked(store.parent / ".lock"):
                self.client = MlflowClient(uri, uri)
                self.experiment_id = self._experiment(experiment, (store.parent / "artifacts").as_uri())
        elif uri.startswith(("http://", "https://")):
            _answers(uri)
            self.client = MlflowClient(uri, uri)
            try:
                self.experiment_id = self._experiment(experiment, None)
            except MlflowException as e:
                first = str(e).splitlines()[0]
                raise DraftlineError(f"The MLflow server at tracking.uri={uri!r} can't be used: {first}") from None
        else:
            raise DraftlineError(
                f"tracking.uri={uri!r} is neither http(s)://, sqlite:/// with an absolute path, nor empty (a sqlite "
                "store under the output root)."
            )

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # another driver made it meanwhile
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise DraftlineError(
                f"The MLflow experiment {name!r} was deleted. Restore it (mlflow experiments restore) or set another "
                "tracking.experiment."
            )
        return found.experiment_id

    def parent(self, name: str, tags: Mapping[str, Any] | None = None) -> str:
        """The id of the pipeline run called `name`: the one that exists, when it is resumed, otherwise a new one."""
        query = f"tags.`{PIPELINE}` = '{_quotable(name)}'"
        found = self._search(query)
        if found:
            run_id = found[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
        else:
            run_id = self.client.create_run(self.experiment_id, run_name=name, tags={PIPELINE: name}).info.run_id
        self._tag(run_id, {**standard_tags(), **(tags or {})})
        return run_id

    def recorded(self, name: str, stage: str, digest: str) -> bool:
        """Whether the pipeline run `name` has a finished run of a stage whose artifact has this digest."""
        for run in self._search(f"tags.`{PIPELINE}` = '{_quotable(name)}'"):
            query = f"tags.`{PARENT}` = '{run.info.run_id}' and tags.`{STAGE}` = '{_quotable(stage)}'"
            if self._search(f"{query} and tags.`{ARTIFACT}` = '{digest}' and attributes.status = 'FINISHED'"):
                return True
        return False

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a parent run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    @contextlib.contextmanager
    def running(self, name: str, tags: Mapping[str, Any] | None = None) -> Iterator[str]:
        """`parent` for the length of a block; the run ends as the block did."""
        run_id = self.parent(name, tags)
        with self._ending(run_id):
            yield run_id

    @contextlib.contextmanager
    def stage(self, parent_id: str, name: str, tags: Mapping[str, Any] | None = None) -> Iterator[StageRun]:
        """A child run for one stage; it ends FINISHED, FAILED (an error) or KILLED (interrupted, terminated).

        A run of the same stage that a killed process left open is closed as KILLED first.
        """
        for left in self._search(f"tags.`{PARENT}` = '{parent_id}' and tags.`{STAGE}` = '{_quotable(name)}'"):
            if left.info.status == "RUNNING":
                self.client.set_terminated(left.info.run_id, "KILLED")
        run = self.client.create_run(self.experiment_id, run_name=name, tags={PARENT: parent_id, STAGE: name})
        self._tag(run.info.run_id, {**standard_tags(), **(tags or {})})
        with self._ending(run.info.run_id):
            yield StageRun(self.client, run.info.run_id)

    def _search(self, query: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment_id], query, max_results=1000))

    def _tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        for key, value in tags.items():
            self.client.set_tag(run_id, key, str(value))

    @contextlib.contextmanager
    def _ending(self, run_id: str) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            status = "KILLED" if isinstance(e, KeyboardInterrupt) else "FAILED"
            if isinstance(e, SystemExit):
                status = "FINISHED" if e.code in (None, 0) else "KILLED" if e.code in _KILLED_CODES else "FAILED"
            # Recording the end must not hide why it ended: a lost server would replace the stage's own error.
            with contextlib.suppress(MlflowException):
                if status == "FAILED":
                    self.client.set_tag(run_id, "draftline.error", f"{type(e).__name__}: {e}"[:4000])
                self.client.set_terminated(run_id, status)
            raise
        self.client.set_terminated(run_id, "FINISHED")


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage's run: a client and an id. Pickled, it opens a client of its own where it arrives."""

    client: MlflowClient
    run_id: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.client.tracking_uri, self.run_id)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Logs a resolved config: flattened (`a.b.c`) as params, whole as the artifact `config.json`.

        MLflow cuts params at 6000 characters: a longer value ends in `...` there and is whole in the artifact.
        """
        params = [
            Param(k, v if len(v) <= MAX_PARAM else v[: MAX_PARAM - 3] + "...") for k, v in flatten(config).items()
        ]
        for first in range(0, len(params), MAX_BATCH):
            self.client.log_batch(self.run_id, params=params[first : first + MAX_BATCH])
        self.log_dict(dict(config), "config.json")

    def log_dict(self, value: Any, name: str) -> None:
        """Writes a JSON-able value as the artifact `name`."""
        with tempfile.TemporaryDirectory() as aside:
            file = Path(aside) / Path(name).name
            file.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")
            folder = str(Path(name).parent)
            self.client.log_artifact(self.run_id, str(file), None if folder == "." else folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers; a step of None is 0."""
        now = int(time.time() * 1000)
        rows = [Metric(k, float(v), now, step or 0) for k, v in metrics.items()]
        for first in range(0, len(rows), MAX_BATCH):
            self.client.log_batch(self.run_id, metrics=rows[first : first + MAX_BATCH])

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copies a file, or a directory's content, into the run's artifacts (under `folder`)."""
        if Path(path).is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_input(self, name: str, digest: str, source: Path | str, context: str) -> None:
        """Records an input artifact as a dataset of this run.

        MLflow refuses digests over 36 characters: the first 32 go into the dataset, the whole one into the tag
        `input.<name>`.
        """
        data = MetaDataset(  # type: ignore[abstract]  # `profile` is only declared, never needed
            LocalArtifactDatasetSource(str(source)), name=name, digest=digest[:MAX_DIGEST]
        )
        entity = DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
        self.client.log_inputs(self.run_id, [entity])
        self.tag({f"input.{name}": digest})

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags (values as text)."""
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, str(value))


Begin = Callable[[], StageRun]
"""Gives the stage's run, opened at the first call: where nothing is new there is none."""


def _reopened(uri: str, run_id: str) -> StageRun:
    return StageRun(MlflowClient(uri, uri), run_id)


def standard_tags() -> dict[str, str]:
    """Tags that every run carries: code version, and the Ray job when there is one."""
    tags = {"code_version": code_version()}
    if job := ray_job_id():
        tags["ray.job_id"] = job
    return tags


def ray_job_id() -> str | None:
    """The submission id of the Ray job that runs this process, or the cluster's own job id, or None outside Ray."""
    with contextlib.suppress(ValueError, AttributeError):
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
        if submission := metadata.get("job_submission_id"):
            return str(submission)
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return str(ray.get_runtime_context().get_job_id())
    return None


def identity_tags(target: Mapping[str, str]) -> dict[str, str]:
    """A target's identity as tags: target.id, target.revision, target.weight_digest, ..."""
    return {f"target.{key}": value for key, value in target.items()}


def tagged_identity(tags: Mapping[str, str]) -> dict[str, str]:
    """The target's identity that `identity_tags` wrote."""
    return {key.removeprefix("target."): value for key, value in tags.items() if key.startswith("target.")}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c` -> text; lists are JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _answers(uri: str) -> None:
    """Raises DraftlineError when no HTTP server listens: MLflow's own client would retry for minutes first."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            pass
    except urllib.error.HTTPError:
        pass  # it answers, if only to ask who we are
    # The others: an address that is none (ValueError: half an IPv6 address, a name with an empty part), a port that is
    # no number, and what answers in another protocol.
    except (OSError, http.client.HTTPException, ValueError) as e:
        why = str(getattr(e, "reason", e)) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        raise DraftlineError(
            f"No MLflow server answers at tracking.uri={uri!r} ({' '.join(why.split())}). Start it, mend the address, "
            "or leave tracking.uri empty for a sqlite store under the output root."
        ) from None


def _quotable(name: str) -> str:
    if "'" in name or "\\" in name:
        raise DraftlineError(
            f"The run name {name!r} holds a quote or backslash; use letters, digits, '-', '_' and '.'."
        )
    return name
