"""The main job: from conversations to a draft that is trained, measured, gated, promoted and has served an answer.

ray job submit --working-dir . -- python jobs/pipeline.py experiment=demo
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

import json
import time
from typing import Any

from jobs import calibrate, corpus, evaluate, extract, promote, regenerate, register, serve, train
from pipeline.artifact import Manifest, digest_json, write_json
from pipeline.config import PipelineConfig, to_plain
from pipeline.entry import recorder, run


def main(config: PipelineConfig) -> None:
    began = time.monotonic()
    tracker = recorder(config)
    (config.run_dir / "summary.json").unlink(missing_ok=True)  # a run that is refused must not leave another's figures
    with tracker.running(config.name) as parent:
        print("== regenerate", flush=True)
        regenerate.main(config)
        corpus.stage(config, parent)
        if config.features.mode == "store":
            extract.stage(config, parent)
        train.stage(config, parent)
        calibrate.stage(config, parent)
        report = evaluate.stage(config, parent)
        version = register.stage(config, parent)
        decision = promote.stage(config, parent)
        if not decision.promoted:
            raise SystemExit(promote.REFUSED)
        serve_once(config, report)
    content = json.loads((config.run_dir / "report" / "report.json").read_text())
    summary = summarise(config, content, version, tracker.uri, time.monotonic() - began)
    write_json(config.run_dir / "summary.json", summary)
    print(f"pipeline: {json.dumps(summary)}", flush=True)


def serve_once(config: PipelineConfig, report: Manifest) -> None:
    """Deploys the champion, asks one question, takes it down; skipped when this draft has answered it before."""
    from pipeline.serving.app import undeploy

    print("== serve", flush=True)
    file = config.run_dir / "served.json"
    key = digest_json([report.digest, to_plain(config.serving)])
    if file.is_file() and json.loads(file.read_text()).get("key") == key:
        print(f"== serve: skipped, this champion answered before ({file})", flush=True)
        return
    began = time.monotonic()
    url, version = serve.start(config)
    try:
        reply = serve.ask(url, config.serving.question, config.serving.max_tokens)
    finally:
        undeploy(config.serving.app_name)
    write_json(file, {"key": key, "version": version, "question": config.serving.question, **reply})
    tau = reply["draftline"].get("tau")
    print(f"serve: champion version {version} at {url}\n  Q: {config.serving.question}", flush=True)
    print(f"  A: {reply['answer']}\n  tau {tau}", flush=True)
    print(f"== serve: done in {time.monotonic() - began:.0f} s", flush=True)


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
    sys.exit(run(main, name="pipeline"))
