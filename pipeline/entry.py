"""How a job starts: Hydra composes, the typed edge checks, Ray connects, and a user's mistake is one line."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import MANIFEST, Manifest
from pipeline.config import PipelineConfig, from_plain, to_plain
from pipeline.errors import ConfigError, DraftlineError, nearest

if TYPE_CHECKING:
    from pipeline.registry.recorder import StageRun

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(overrides: list[str], conf: Path = CONF) -> PipelineConfig:
    """The configuration of a list of Hydra overrides (`experiment=demo trainer.steps=10`).

    Raises:
        ConfigError: anything unknown, ill-typed or missing, with the nearest valid name.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for o in overrides:
        _check_group(o, conf)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return typed(hydra.compose("config", overrides=forced(overrides)))
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(_explain(str(e), overrides)) from None


def forced(overrides: list[str]) -> list[str]:
    """The overrides as Hydra takes them: a setting that no YAML mentions still has its dataclass default to override,
    and `++` adds or replaces."""
    return [f"++{o}" if "." in o.partition("=")[0] and o[0] not in "+~" else o for o in overrides]


def typed(composed: Any) -> PipelineConfig:
    """The checked configuration of what Hydra composed.

    Raises:
        ConfigError: anything unknown or ill-typed. OmegaConfBaseException: a value that is missing.
    """
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("experiment", None)
    return from_plain(PipelineConfig, {str(k): v for k, v in plain.items()})


def _check_group(override: str, conf: Path) -> None:
    key, _, value = override.partition("=")
    key = key.lstrip("+~")
    groups = sorted(p.name for p in conf.iterdir() if p.is_dir())
    if "=" not in override:
        raise ConfigError(
            f"{override!r} is not a setting; write name=value, for example experiment=demo (--help names them)."
        )
    if key in groups:
        options = sorted(p.stem for p in (conf / key).glob("*.yaml"))
        if value not in options:
            raise ConfigError(
                f"{key}={value} does not exist.{nearest(value, options)} There are: {', '.join(options)}."
            )
    elif "." not in key:
        names = [*groups, *PipelineConfig.__dataclass_fields__]
        if key not in names:
            raise ConfigError(
                f"{key!r} is not a setting.{nearest(key, names)} There are: {', '.join(sorted(set(names)))}."
            )


def _explain(text: str, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's messages in one line, with a nearest name where a key is unknown."""
    if found := re.search(r"full_key: (\S+)", text) if "Missing mandatory value" in text else None:
        key = found.group(1)
        return f"{key} has no value; give one: {key}=..."
    return " ".join(text.split()) + f" (overrides: {' '.join(overrides)})"


def run(
    main: Callable[[PipelineConfig], Any],
    name: str,
    argv: list[str] | None = None,
    ray: bool = True,
    settings: Sequence[str] = (),
    page: str = "jobs",
) -> int:
    """Runs a job's main with the configuration of the command line; returns the exit status.

    Args:
        ray: connect to Ray first.
        settings: groups of settings that matter most to the job, for `--help`. page: of docs/, likewise.

    0: done. 2: a mistake the user can mend, said in one line. A SystemExit's own status passes. Anything else keeps
    its trace and gives 1.
    """
    # What the library prints must appear as it happens, wherever the output goes.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        from pipeline.usage import usage

        print(usage(sys.modules[main.__module__].__doc__ or "", name, settings, page, CONF))
        return 0
    try:
        config = compose(argv)
        _check_places(config)
        if ray:
            connect(config)
        main(config)
        return 0
    except DraftlineError as e:
        print(f"{name}: {e}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _check_places(config: PipelineConfig) -> None:
    """Refuses, in a submitted job, places under Ray's own copy of the working directory: Ray deletes it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    places = {"output_root": config.output_root, "cache_dir": config.cache_dir}
    if config.export.out:
        places["export.out"] = config.export.out
    for key, place in places.items():
        if not Path(place).is_absolute():
            raise ConfigError(
                f"{key}={place!r} is relative, and a submitted job runs in a copy of its working "
                f"directory that Ray deletes. Give an absolute path that every node sees: {key}=/shared/..."
            )


def connect(config: PipelineConfig) -> None:
    """Joins the cluster that the job runs in (RAY_ADDRESS), or starts a local one."""
    import logging

    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        ray.init(
            address="local",  # a cluster that somebody started on this machine is not joined by accident
            num_cpus=config.cluster.num_cpus,
            include_dashboard=False,
            object_store_memory=int(config.cluster.object_store_gib * 2**30),
            **options,
        )
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def recorder(config: PipelineConfig) -> Any:
    """The MLflow recorder of a configuration (sqlite under the output root unless `tracking.uri` is set)."""
    from pipeline.registry.recorder import Recorder

    return Recorder(config.tracking.uri, config.tracking.experiment, root=Path(config.output_root).absolute())


class StageRecord:
    """The MLflow run of a stage, opened when the stage has work to do: one that is skipped leaves none."""

    def __init__(self, name: str, config: PipelineConfig, parent: str | None) -> None:
        self.recorder = recorder(config)
        self._name, self._config, self._parent = name, config, parent
        self._run: StageRun | None = None
        self._stack = ExitStack()

    @property
    def begun(self) -> bool:
        return self._run is not None

    def begin(self) -> StageRun:
        """Opens the run, with the whole configuration on it; the same one at every call."""
        if self._run is None:
            top = self._parent or self._stack.enter_context(self.recorder.running(self._config.name))
            self._run = self._stack.enter_context(self.recorder.stage(top, self._name))
            self._run.log_config(to_plain(self._config))
        return self._run

    def __enter__(self) -> StageRecord:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def record(
    name: str,
    config: PipelineConfig,
    make: Callable[[Callable[[], StageRun]], Manifest],
    out: Path,
    *,
    sources: Mapping[str, Path | str],
    parent: str | None = None,
    metrics: Callable[[Manifest], Mapping[str, float]] | None = None,
    tags: Callable[[Manifest], Mapping[str, str]] | None = None,
    files: Iterable[str] = (),
) -> Manifest:
    """Runs a stage that makes one artifact: prints its header and time, or why it was skipped, and records it.

    The stage's run is there while it works, and ends as it did (finished, failed, killed). A stage whose artifact is
    current is skipped; if no finished run tells of that artifact (the tracking server was lost), it is recorded then.

    Args:
        make: the stage; calls its argument when it finds that there is work, returns the manifest of what is at `out`.
        sources: where each input of the manifest is.
        parent: MLflow run it belongs to; None takes the one of `config.name`.
        metrics, tags: numbers and words to record from the manifest. files: names in `out` to store with the run.
    """
    from pipeline.registry.recorder import ARTIFACT, identity_tags

    began = time.monotonic()
    print(f"== {name}", flush=True)
    with StageRecord(name, config, parent) as stage:
        manifest = make(stage.begin)
        worked = stage.begun
        if worked or not stage.recorder.recorded(config.name, name, manifest.digest):
            run_ = stage.begin()
            run_.tag(identity_tags(manifest.target or {}) | {ARTIFACT: manifest.digest})
            run_.tag(tags(manifest) if tags else {})
            for key, digest in manifest.inputs.items():
                run_.log_input(key, digest, sources[key], name)
            numbers = {k: float(v) for k, v in manifest.counts.items()} | dict(metrics(manifest) if metrics else {})
            run_.log_metrics(numbers | ({"seconds": time.monotonic() - began} if worked else {}))
            run_.log_artifact(out / MANIFEST)
            for file in files:
                run_.log_artifact(out / file)
    if worked:
        print(f"== {name}: done in {time.monotonic() - began:.0f} s -> {out}", flush=True)
    else:
        print(f"== {name}: skipped, inputs and settings unchanged (artifact {manifest.digest[:12]})", flush=True)
    return manifest
