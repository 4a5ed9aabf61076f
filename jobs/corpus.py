"""Conversations to token rows with loss masks, split into training and held-out prompts.

ray job submit --working-dir . -- python jobs/corpus.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from collections.abc import Callable

from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.entry import record, run


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    from pipeline.corpus.build import build_corpus
    from pipeline.target import load_tokenizer
    from pipeline.target.loading import load_identity

    out = config.run_dir / "corpus"

    def make(begin: Callable[[], object]) -> Manifest:
        tokenizer = load_tokenizer(config.target, config.cache)
        identity = load_identity(config.target, config.cache, tokenizer).as_dict()
        return build_corpus(
            config.corpus, tokenizer, identity, out, system_prompt=config.target.system_prompt, begin=begin
        )

    sources = {"source": config.corpus.source, "chat_template": config.target.path, "tokenizer": config.target.path}
    manifest = record("corpus", config, make, out, sources=sources, parent=parent, tags=authorship)
    print(f"corpus: {manifest.counts}")
    if differs := manifest.info.get("foreign"):
        by = manifest.info["regenerated_by"]
        print(
            f"corpus: WARNING: the answers of {config.corpus.source} were written by {by.get('id')} (weights "
            f"{by.get('weight_digest', '')[:12]}), whose {' and '.join(differs)} differ from those of the target "
            f"{(manifest.target or {}).get('id')}. A draft learns best from its own target's answers: give the file as "
            "corpus.regenerate.prompts and take as corpus.source what jobs/regenerate.py writes.",
            flush=True,
        )
    return manifest


def authorship(manifest: Manifest) -> dict[str, str]:
    """Tags that say who wrote a corpus' answers."""
    by = manifest.info.get("regenerated_by") or {}
    return {
        "answers.target": by.get("id", "not known"),
        "answers.differ_from_target": ", ".join(manifest.info.get("foreign", [])),
    }


if __name__ == "__main__":
    sys.exit(run(stage, name="corpus", ray=False, settings=("corpus",), page="corpus"))
