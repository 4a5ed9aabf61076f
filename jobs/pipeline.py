"""The main job: from conversations to a draft that is trained, measured, gated, promoted and has served an answer.

ray job submit --working-dir . -- python jobs/pipeline.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

import json
import time
from typing import Any

from jobs import calibrate, corpus, evaluate, extract, parity, promote, regenerate, register, serve, train
from pipeline.artifact import write_json
from pipeline.config import PipelineConfig
from pipeline.entry import recorder, run


def main(config: PipelineConfig) -> None:
    began = time.monotonic()
    tracker = recorder(config)
    file = config.run_dir / "summary.json"
    former = json.loads(file.read_text()) if file.is_file() else {}
    file.unlink(missing_ok=True)  # a run that is refused must not leave another's figures
    with tracker.running(config.name) as parent:
        regenerate.stage(config, parent)
        corpus.stage(config, parent)
        if config.features.mode == "store":
            extract.stage(config, parent)
        train.stage(config, parent)
        calibrate.stage(config, parent)
        parity.require(config, parity.stage(config, parent))
        evaluate.stage(config, parent)
        version = register.stage(config, parent)
        decision = promote.stage(config, parent, version)
        if not decision.promoted:
            raise SystemExit(promote.REFUSED)
        serve.stage(config, parent)
    content = json.loads((config.run_dir / "report" / "report.json").read_text())
    summary = summarise(config, content, version, tracker.uri, time.monotonic() - began)
    if {**former, "seconds": None} == {**summary, "seconds": None}:
        summary["seconds"] = former["seconds"]  # nothing was made again: what it took to make this
    write_json(file, summary)
    print(f"pipeline: {json.dumps(summary)}", flush=True)


def summarise(config: PipelineConfig, report: dict[str, Any], version: str, uri: str, seconds: float) -> dict[str, Any]:
    """The figures of summary.json."""
    h = report["headline"]
    return {
        "target": report["target"]["id"],
        "draft": str(config.run_dir / "calibrated"),
        "tau": h["tau"],
        "accept_rate": h["accept_rate"],
        "speedup": h["speedup"],
        "speedup_low": h["speedup_low"],
        "speedup_t1": h["speedup_t1"],
        "ngram_speedup": h["ngram_speedup"],
        "exact_greedy": report["exact_greedy"],
        "champion_version": version,
        "mlflow_uri": uri,
        "report": str(config.run_dir / "report" / "report.html"),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(run(main, name="pipeline", settings=("target", "corpus", "draft", "trainer")))
