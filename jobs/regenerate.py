"""Answers prompts with the target itself: the corpus a draft should learn from.

ray job submit --working-dir . -- python jobs/regenerate.py experiment=demo \\
    output_root=$PWD/outputs cache_dir=$PWD/.cache/draftline corpus.regenerate.limit=0
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))  # as a script: this folder has a pipeline.py too

from pipeline.artifact import Manifest
from pipeline.config import PipelineConfig
from pipeline.corpus.answers import CONVERSATIONS
from pipeline.corpus.regenerate import regenerate
from pipeline.entry import record, run


def stage(config: PipelineConfig, parent: str | None = None) -> Manifest:
    out = config.run_dir / "regenerated"
    manifest = record(
        "regenerate",
        config,
        lambda begin: regenerate(config, out, begin),
        out,
        sources={"prompts": config.corpus.regenerate.prompts},
        parent=parent,
    )
    print(f"regenerate: {manifest.counts} -> {out / CONVERSATIONS}", flush=True)
    warn(manifest)
    return manifest


def warn(manifest: Manifest) -> None:
    """Says what is odd about the answers: those that had less room than they were to have, and those that failed."""
    counts, asked = manifest.counts, manifest.config
    pool_cut = counts.get("pool_cut")  # of an artifact from before it was counted: not told
    if counts["clipped"]:
        said = (
            f"regenerate: WARNING: {counts['clipped']} of {counts['rows']} prompts left their answers less room than "
            f"corpus.regenerate.max_new_tokens={asked['sampling']['max_new_tokens']} in engine.max_context="
            f"{asked['max_context']}, or in what the KV pool holds where that is less; {counts['clipped_cut']} answers "
            "were cut by it."
        )
        if pool_cut:
            said += (
                f" The KV pool cut {pool_cut} of these, and the next run asks them again: raise engine.kv_gib, or free "
                "memory where it is 0, to have them whole."
            )
        if pool_cut is not None and counts["clipped_cut"] > pool_cut:
            said += (
                f" engine.max_context cut {counts['clipped_cut'] - pool_cut}: raise it to have them whole, and all "
                "prompts are asked anew."
            )
        print(said, flush=True)
    if counts["failed"]:
        first, again = manifest.info["failed"][0], counts["retry"] - (pool_cut or 0)
        print(
            f"regenerate: WARNING: {counts['failed']} of {asked['prompts']} prompts have no answer (the first, row "
            f"{first['row']}: {first['error']})."
            + (f" The engine failed at {again}, or lacked pages: the next run asks them again." if again else ""),
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run(stage, name="regenerate", settings=("corpus.regenerate", "target"), page="corpus"))
