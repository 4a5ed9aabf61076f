"""Trains a draft for every combination of comma-separated values, on one corpus and its features, and compares them.

ray job submit --working-dir . -- python jobs/sweep.py experiment=demo trainer.lr=5e-4,1e-3 trainer.kl=0.5,1.0 \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline

It is Hydra's multirun: `range(...)` and the like are taken, and `hydra/launcher=joblib hydra.launcher.n_jobs=2` (the
extra [sweep]) runs trials side by side. The same sweep again trains only what is missing.
"""

from __future__ import annotations

import os
import sys
import traceback

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

import dataclasses
import json
from pathlib import Path
from typing import Any

from jobs import corpus, extract, train
from pipeline.artifact import digest_json, write_json
from pipeline.config import PipelineConfig
from pipeline.entry import CONF, compose, connect, forced, run, typed
from pipeline.errors import ConfigError, DraftlineError

SHARED = ("regenerated", "corpus", "features")


@dataclasses.dataclass(frozen=True)
class Swept:
    """A setting as it was written, and its values."""

    text: str
    values: list[str]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A command line taken apart.

    Attributes:
        fixed: settings of every trial. swept: those with several values, by name. hydra: Hydra's own (launcher, ...).
    """

    fixed: list[str]
    swept: dict[str, Swept]
    hydra: list[str]

    def check(self) -> None:
        """Raises ConfigError where a swept name or value is none: it must not cost the corpus first."""
        if not self.swept:
            raise ConfigError("Nothing is swept. Give a setting several values: trainer.lr=5e-4,1e-3.")
        first = {key: s.values[0] for key, s in self.swept.items()}
        for key, s in self.swept.items():
            for value in s.values:
                compose([*self.fixed, *(f"{k}={v}" for k, v in {**first, key: value}.items())])


def parse(argv: list[str]) -> Sweep:
    """Raises ConfigError where a setting can't be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = Sweep([], {}, [])
    for text in argv:
        if text.partition("=")[0].split(".")[0].split("/")[0].lstrip("+~") == "hydra":
            found.hydra.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as e:
            raise ConfigError(f"{text!r} can't be read: {' '.join(str(e).split())}") from None
        if override.is_sweep_override():
            found.swept[override.get_key_element()] = Swept(text, list(override.sweep_string_iterator()))
        else:
            found.fixed.append(text)
    return found


def trial(composed: Any) -> float:
    """One combination: its tokens per target step as training saw them, or -inf where it can't be trained."""
    from hydra.core.hydra_config import HydraConfig

    base = typed(composed)
    label = HydraConfig.get().job.override_dirname.replace("++", "")
    config = dataclasses.replace(base, name=f"{base.name}-{digest_json(label)[:8]}")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for part in SHARED:
        # What the trial's settings would make otherwise replaces the link, not what it points to.
        mine, theirs = config.run_dir / part, base.run_dir / part
        if theirs.exists() and not mine.exists():
            mine.unlink(missing_ok=True)
            mine.symlink_to(theirs)
    result: dict[str, Any] = {"settings": label, "name": config.name}
    try:
        connect(config)
        corpus.stage(config)
        if config.features.mode == "store":
            extract.stage(config)
        result |= train.stage(config).info["training"]
    except Exception as e:  # whatever a trial dies of, memory too: the others go on
        result["error"] = str(e)
        print(f"sweep: {label}: {e}" if isinstance(e, DraftlineError) else traceback.format_exc(), flush=True)
    results(base).mkdir(parents=True, exist_ok=True)  # of another name, where the name itself is swept
    write_json(results(base) / f"{config.name}.json", result)
    return float(result.get("tau", float("-inf")))


def results(base: PipelineConfig) -> Path:
    """Where the trials of a run's sweeps leave their figures, one file each."""
    return base.run_dir.with_name(f"{base.name}-sweep")


def sweep(base: PipelineConfig, asked: Sweep) -> None:
    """Runs the trials; Ray must be initialised.

    Raises:
        DraftlineError: a corpus or features that can't be made, or no trial that could be trained.
    """
    import hydra

    corpus.stage(base)
    if base.features.mode == "store":
        extract.stage(base)
    results(base).mkdir(parents=True, exist_ok=True)
    for old in results(base).glob("*.json"):
        old.unlink()
    keys = ",".join(o.partition("=")[0].lstrip("+~") for o in asked.fixed)
    exclude = f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"
    before = sys.argv
    sys.argv = [
        before[0],
        "--multirun",
        *forced([*asked.fixed, *(s.text for s in asked.swept.values())]),
        *asked.hydra,
        exclude,
    ]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(trial)()
    finally:
        sys.argv = before
    print(table([json.loads(f.read_text()) for f in sorted(results(base).glob("*.json"))]), flush=True)
    print(f"sweep: figures in {results(base)}", flush=True)


def table(trials: list[dict[str, Any]]) -> str:
    """The trials, best first: by tokens per target step in training (teacher-forced).

    Raises:
        DraftlineError: none of them could be trained.
    """
    trained = sorted((t for t in trials if "tau" in t), key=lambda t: -t["tau"])
    if not trained:
        errors = "; ".join(f"{t['settings']}: {t['error']}" for t in trials)
        raise DraftlineError(f"No trial of the sweep could be trained ({errors}).")
    lines = ["tau     greedy  loss    trial"]
    lines += [
        f"{t['tau']:<8.3f}{t['tau_greedy']:<8.3f}{t['loss']:<8.3f}{t['settings']}  ({t['name']})" for t in trained
    ]
    lines += [f"{'failed':<24}{t['settings']}" for t in trials if "tau" not in t]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    def start(base: PipelineConfig) -> None:
        asked.check()
        connect(base)
        sweep(base, asked)

    groups = ("trainer", "trainer.warm_start", "draft")
    try:
        asked = parse([] if {"--help", "-h"} & set(argv) else argv)
    except ConfigError as e:
        print(f"sweep: {e}", file=sys.stderr, flush=True)
        return 2
    return run(start, "sweep", asked.fixed or argv, ray=False, settings=groups, page="training")


if __name__ == "__main__":
    # By its module's name: trials in other processes must find it.
    from jobs.sweep import main as by_name

    sys.exit(by_name(sys.argv[1:]))
