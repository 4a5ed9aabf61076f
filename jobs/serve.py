"""Serves the champion behind an OpenAI-compatible API until it is interrupted.

ray job submit --working-dir . -- python jobs/serve.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline serving.port=8000
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import digest_json, write_json
from pipeline.config import PipelineConfig, to_plain
from pipeline.entry import StageRecord, recorder, run

if TYPE_CHECKING:
    from pipeline.registry.recorder import StageRun


def start(config: PipelineConfig) -> tuple[str, str]:
    """Deploys the champion; returns (base URL, version)."""
    from pipeline.registry.versions import champion, registered_name
    from pipeline.serving.app import deploy

    best = champion(recorder(config), registered_name(config), config.cache / "champions")
    url = deploy(
        config.serving,
        config.target,
        config.engine,
        cache_dir=config.cache,
        draft_dir=best.draft_dir,
        model_name=best.name,
        draft_version=best.version,
    )
    return url, best.version


@contextlib.contextmanager
def served(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """The champion behind its API for the length of a block: (base URL, version)."""
    from pipeline.serving.app import undeploy

    try:
        url, version = start(config)
    except (KeyboardInterrupt, SystemExit):
        # Serve goes on deploying without us. An error is another matter: what stands under that name may be another's.
        undeploy(config.serving.app_name, timeout=0)
        raise
    try:
        yield url, version
    finally:
        undeploy(config.serving.app_name)


def ask(url: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One question through the official openai client: model, answer, and the answer's speculation."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0)
    extra = reply.model_extra or {}
    return {"model": model, "answer": reply.choices[0].message.content, "draftline": extra.get("draftline", {})}


def stage(config: PipelineConfig, parent: str | None = None) -> dict[str, Any]:
    """Deploys the champion, asks one question, takes it down; skipped when this champion has answered it before."""
    from pipeline.registry.versions import champion, registered_name

    print("== serve", flush=True)
    file = config.run_dir / "served.json"
    with StageRecord("serve", config, parent) as record:
        best = champion(record.recorder, registered_name(config), config.cache / "champions")
        plain = [to_plain(c) for c in (config.serving, config.target, config.engine)]
        key = digest_json([best.version, best.manifest.digest, *plain])
        if file.is_file() and (before := json.loads(file.read_text())).get("key") == key:
            if not record.recorder.recorded(config.name, "serve", key):  # the tracking server was lost
                _note(record.begin(), best.name, before, file)
            print(f"== serve: skipped, this champion answered before ({file})", flush=True)
            return before
        began, run_ = time.monotonic(), record.begin()
        with served(config) as (url, version):
            reply = ask(url, config.serving.question, config.serving.max_tokens)
        content = {"key": key, "version": version, "question": config.serving.question, **reply}
        file.parent.mkdir(parents=True, exist_ok=True)  # a champion may be served under a new name
        write_json(file, content)
        _note(run_, best.name, content, file)
        run_.log_metrics({"seconds": time.monotonic() - began})
    print(f"serve: champion version {version} at {url}\n  Q: {config.serving.question}", flush=True)
    print(f"  A: {reply['answer']}\n  tau {reply['draftline']['tau']}", flush=True)
    print(f"== serve: done in {time.monotonic() - began:.0f} s", flush=True)
    return content


def _note(run_: StageRun, model: str, content: dict[str, Any], file: Path) -> None:
    """Records an answer of the champion's, under the key by which a later start finds it recorded."""
    from pipeline.registry.recorder import ARTIFACT

    run_.tag({"model": model, "version": content["version"], ARTIFACT: content["key"]})
    run_.log_metrics({"tau": content["draftline"]["tau"]})
    run_.log_artifact(file)


def main(config: PipelineConfig) -> None:
    with StageRecord("serve", config, None) as record:
        run_ = record.begin()
        with served(config) as (url, version):
            run_.tag({"version": version, "url": url})
            print(f"serving champion version {version} at {url}/v1 (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    sys.exit(run(main, name="serve", settings=("serving", "engine"), page="serving"))
