"""Training's acceptance against the served one, for all three algorithms.

python benchmarks/parity.py --steps 200 --json parity.json

Trains a small draft of each algorithm on SmolLM2-135M-Instruct, decodes held-out prompts with it, greedily and at
temperature 1, and lets the parity gate compare: what the training forward expects of every slot that the engine
reached, teacher-forced on the decoded text, and what the engine accepted there. The last column says whether their
difference is within its statistical error (three standard deviations); a draft of which it is not can't be registered.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from algorithms import LAYERS, SIDES, trained_draft
from trained import corpus_of, features

from pipeline.artifact import write_json
from pipeline.config import EngineConfig, ParityConfig, TargetConfig
from pipeline.corpus.build import read_rows
from pipeline.decoding import Engine
from pipeline.evaluation.parity import compare, decode
from pipeline.target import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="pipeline/corpus/demo/demo.jsonl.zst")
    parser.add_argument("--rows", type=int, default=300, help="conversations to read; 0 takes all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--cache", default=".cache/draftline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = Path(args.cache)
    extractor = load_target(TargetConfig(dtype="bfloat16"), cache)
    corpus = corpus_of(args.source, args.rows, extractor, cache, "parity-corpus")
    train = features(extractor, read_rows(corpus, "train"), LAYERS)
    held = read_rows(corpus, "heldout")[: args.prompts]
    parity = ParityConfig(prompts=args.prompts, max_new_tokens=args.max_new_tokens)
    target = load_target(TargetConfig(), cache)
    results: dict[str, Any] = {}
    print(f"{'draft':<10}{'decoding':<10}{'position':>9}{'slots':>7}{'training':>10}{'engine':>8}  within its error")
    for side in [s for s in SIDES if " " not in s]:
        draft = trained_draft(side, 0, args.steps, target, corpus, train)
        config = EngineConfig(max_requests=1, max_context=512, rule="ratio", scheduler="fixed", threads=args.threads)
        engine = Engine(load_target(TargetConfig(), cache), config)
        checks, positions = compare(
            target, draft, decode(engine, draft, held, parity, 0.0), decode(engine, draft, held, parity, 1.0)
        )
        within = {c.name: c.passed for c in checks}
        for kind in ("greedy", "sampled"):
            for p in positions:
                passed = within.get(f"{kind} acceptance {p['position']}")
                told = "too few slots" if passed is None else "yes" if passed else "NO"
                f = p[kind]
                print(
                    f"{side:<10}{kind:<10}{p['position']:>9}{f['slots']:>7}{f['training']:>10.3f}{f['engine']:>8.3f}"
                    f"  {told}",
                    flush=True,
                )
        results[side] = {"checks": [dataclasses.asdict(c) for c in checks], "positions": positions}
        logits = next(c for c in checks if c.name == "draft logits")
        print(f"{side:<10}draft logits differ by {logits.value:.4f} of their deviation ({logits.detail})", flush=True)
    if args.json:
        write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "drafts": results})


if __name__ == "__main__":
    main()
