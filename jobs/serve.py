"""Serves the champion behind an OpenAI-compatible API until it is interrupted.

ray job submit --working-dir . -- python jobs/serve.py experiment=demo serving.port=8000
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("jobs"):
    del sys.path[0]  # as a script: this folder's pipeline.py shadows the package of that name

import time
from typing import Any

from jobs.register import registered_name
from pipeline.config import PipelineConfig
from pipeline.entry import recorder, run


def start(config: PipelineConfig) -> tuple[str, str]:
    """Deploys the champion; returns (base URL, version)."""
    from pipeline.registry.promotion import champion
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


def ask(url: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One question through the official openai client: model, answer, and the answer's speculation."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0)
    extra = reply.model_extra or {}
    return {"model": model, "answer": reply.choices[0].message.content, "draftline": extra.get("draftline", {})}


def main(config: PipelineConfig) -> None:
    from pipeline.serving.app import undeploy

    url, version = start(config)
    print(f"serving champion version {version} at {url}/v1 (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        undeploy(config.serving.app_name)


if __name__ == "__main__":
    sys.exit(run(main, name="serve"))
