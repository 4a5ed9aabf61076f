"""What each training lever buys: held-out greedy tau after the same seconds of training, one lever at a time.

python benchmarks/levers.py --seconds 80 --variants 'base,cold layers' --json levers.json

Trains the demo's draft in this process (no Ray, no DeepSpeed) on features of SmolLM2-135M's own responses, and
scores blocks of held-out rows: the corpus is greedy, so the teacher-forced agreement of a block is what greedy
decoding would accept. Every variant sees the same rows in the same order for the same wall time, of which its start
(a regression, bigram counts) takes its share; scoring the rows against the whole vocabulary, the same for all, is not
counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from trained import corpus_of, features, fit, step_of

from pipeline.config import TargetConfig, TrainerConfig, WarmStartConfig
from pipeline.corpus.build import read_rows
from pipeline.drafts.config import DraftConfig
from pipeline.features.store import FeatureRow
from pipeline.target import load_target
from pipeline.training.start import build_draft
from pipeline.training.step import StepMetrics, TrainStep

# As conf/experiment/demo; the demo takes fewer and larger steps, as each costs collectives.
BASE: dict[str, Any] = {
    "draft": {
        "block_size": 5,
        "num_layers": 1,
        "num_kv_heads": 9,
        "markov_rank": 128,
        "draft_vocab_size": 4096,
        "qk_norm": False,
    },
    "trainer": {
        "lr": 1e-3,
        "num_anchors": 32,
        "sequences_per_step": 2,
        "autocast": "bfloat16",
        "warmup_steps": 20,
        "ce": 0.5,
        "kl": 0.5,
        "tv": 0.0,
    },
    "warm": {"layers": "features", "markov": True},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {},
    "target layers": {"warm": {"layers": "target"}},
    "target layers and lr 2e-3": {"warm": {"layers": "target"}, "trainer": {"lr": 2e-3}},
    "cold layers": {"warm": {"layers": "none"}},
    "cold markov": {"warm": {"markov": False}},
    "rank 64": {"draft": {"markov_rank": 64}},
    "ce alone": {"trainer": {"ce": 1.0, "kl": 0.0}},
    "kl alone": {"trainer": {"ce": 0.0, "kl": 1.0}},
    "ce 0.1 and tv 0.9": {"trainer": {"ce": 0.1, "kl": 0.0, "tv": 0.9}},
    "lr 2e-3": {"trainer": {"lr": 2e-3}},
    "4 x 40 anchors": {"trainer": {"num_anchors": 40, "sequences_per_step": 4}},
    "2 layers": {"draft": {"num_layers": 2}},
    "vocabulary 8192": {"draft": {"draft_vocab_size": 8192}},
    "block 7": {"draft": {"block_size": 7}},
    "3 taps": {"draft": {"target_layer_ids": [8, 18, 28]}},
}


def score(step: TrainStep, rows: list[Any]) -> dict[str, float]:
    """Teacher-forced metrics on held-out rows."""
    with torch.no_grad():
        return StepMetrics.total([step(rows[i : i + 4], 0)[1] for i in range(0, len(rows), 4)]).summary()


def run(target: Any, corpus: Path, train: list[Any], held: list[Any], variant: dict, seconds: float) -> dict:  # type: ignore[type-arg]
    draft_config = DraftConfig(**{**BASE["draft"], **variant.get("draft", {})})
    warm = WarmStartConfig(**{**BASE["warm"], **variant.get("warm", {})})
    config = TrainerConfig(**{**BASE["trainer"], **variant.get("trainer", {})}, warm_start=warm, steps=10**6)
    began = time.perf_counter()
    draft = build_draft(draft_config, config, target, corpus, train)
    start = time.perf_counter() - began
    step = step_of(draft, config, target)
    for row in (*train, *held):
        step.scores(row)
    n, rate = fit(step, config, train, seconds=seconds - start)
    result = score(step, held)
    seen = score(step, train[:40])
    return {
        "start_seconds": round(start, 1),
        "steps": n,
        "anchors_per_second": rate,
        "tau_heldout": result["tau_greedy"],
        "tau_expected": result["tau"],
        "tau_train": seen["tau_greedy"],
        "agreement": [round(v, 3) for k, v in result.items() if k.startswith("agreement_")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="pipeline/corpus/demo/demo.jsonl.zst")
    parser.add_argument("--rows", type=int, default=0, help="conversations to read; 0 takes all")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--variants", default="")
    parser.add_argument("--cache", default=".cache/draftline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = load_target(TargetConfig(dtype="bfloat16"), Path(args.cache))
    corpus = corpus_of(args.source, args.rows, target, Path(args.cache), "levers-corpus")
    names = [v.strip() for v in args.variants.split(",") if v.strip()] or list(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        parser.error(f"--variants {unknown[0]}: there are {', '.join(VARIANTS)}.")
    results: dict[str, Any] = {}
    cached: dict[str, tuple[list[FeatureRow], list[FeatureRow]]] = {}
    print(
        f"{'variant':<24}{'start s':>8}{'steps':>6}{'anchors/s':>11}{'tau held':>10}{'expected':>10}{'tau train':>11}"
        "  agreement"
    )
    for name in names:
        ids = VARIANTS[name].get("draft", {}).get("target_layer_ids") or [1, 8, 14, 20, 27]
        variant = {**VARIANTS[name], "draft": {**VARIANTS[name].get("draft", {}), "target_layer_ids": ids}}
        if str(ids) not in cached:
            cached.clear()
            cached[str(ids)] = (
                features(target, read_rows(corpus, "train"), ids),
                features(target, read_rows(corpus, "heldout"), ids),
            )
        r = results[name] = run(target, corpus, *cached[str(ids)], variant, args.seconds)
        print(
            f"{name:<24}{r['start_seconds']:>8.1f}{r['steps']:>6}{r['anchors_per_second']:>11.0f}{r['tau_heldout']:>10.3f}"
            f"{r['tau_expected']:>10.3f}{r['tau_train']:>11.3f}  {r['agreement']}",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
