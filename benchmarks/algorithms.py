"""DSpark against DFlash and Eagle3: served acceptance length of drafts that differ in nothing but the algorithm.

python benchmarks/algorithms.py --steps 500 --seeds 3 --json algorithms.json

Same target (SmolLM2-135M-Instruct), corpus, features, steps, seeds, anchors, objective, layer, taps, draft vocabulary
and tokens per block; each starts as `trainer.warm_start.layers=auto` has it: from the features in closed form, DSpark's
Markov head from bigrams (part of what it is; a fourth side starts it cold). `--start target` starts all from the
target's last layer. Every draft then decodes the same held-out
prompts through the engine, whole blocks verified, greedily and at temperature 1 (ratio rule); tau is tokens per target
step, bonus included. Intervals are 95 %, bootstrapped over prompts and seeds, paired.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trained import corpus_of, features, fit, step_of

from pipeline.artifact import write_json
from pipeline.config import EngineConfig, TargetConfig, TrainerConfig, WarmStartConfig
from pipeline.corpus.build import read_rows
from pipeline.decoding import Engine, Request
from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.evaluation.benchmark import block_proposer
from pipeline.target import load_target
from pipeline.training.start import build_draft

LAYERS = [1, 8, 14, 20, 27]
COMMON: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 9, "draft_vocab_size": 4096, "qk_norm": False}
COMMON |= {"block_size": 5, "target_layer_ids": LAYERS}
PLAIN: dict[str, Any] = {"markov_head_type": "none", "enable_confidence_head": False}
SIDES: dict[str, dict[str, Any]] = {
    "dspark": {"algorithm": "dspark", "markov_rank": 128},
    "dflash": {"algorithm": "dflash", **PLAIN},
    "eagle3": {"algorithm": "eagle3", "norm_before_residual": True, **PLAIN},
    "dspark cold Markov": {"algorithm": "dspark", "markov_rank": 128},
}


def trained_draft(
    side: str, seed: int, steps: int, target: Any, corpus: Path, train: list[Any], start: str = "auto"
) -> Draft:
    """A draft of a side, trained."""
    warm = WarmStartConfig(layers=start, markov="cold" not in side)
    config = TrainerConfig(
        lr=1e-3,
        num_anchors=32,
        sequences_per_step=2,
        autocast="bfloat16",
        warmup_steps=20,
        ce=0.5,
        kl=0.5,
        tv=0.0,
        seed=seed,
        steps=steps,
        warm_start=warm,
    )
    draft = build_draft(DraftConfig(**COMMON, **SIDES[side]), config, target, corpus, train)
    step = step_of(draft, config, target)
    fit(step, config, train, steps=steps)
    return draft.eval()


def lengths(engine: Engine, draft: Draft, prompts: list[list[int]], tokens: int, temperature: float) -> np.ndarray:
    """int[P, 2]: tokens decoded and target steps of every prompt."""
    engine.set_proposer(block_proposer(draft, engine.config, "ratio"))
    engine.set_schedule("fixed", rule="ratio")
    requests = [Request(p, tokens, temperature=temperature, seed=i) for i, p in enumerate(prompts)]
    done = engine.generate(requests)
    return np.array([[c.metrics.decoded, c.metrics.target_steps] for c in done])


def tau(counts: np.ndarray) -> float:
    """Of int[.., 2] counts."""
    decoded, steps = counts.reshape(-1, 2).sum(0)
    return float(decoded / max(steps, 1))


def interval(counts: np.ndarray, other: np.ndarray | None = None, draws: int = 2000) -> tuple[float, float, float]:
    """tau of int[seeds, P, 2] counts, or its ratio to another's, with a bootstrap over seeds and prompts."""
    chance = np.random.default_rng(0)
    seeds, prompts = counts.shape[:2]

    def value(s: np.ndarray, p: np.ndarray) -> float:
        mine = tau(counts[np.ix_(s, p)])
        return mine if other is None else mine / tau(other[np.ix_(s, p)])

    found = sorted(
        value(chance.integers(seeds, size=seeds), chance.integers(prompts, size=prompts)) for _ in range(draws)
    )
    return value(np.arange(seeds), np.arange(prompts)), found[int(0.025 * draws)], found[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="pipeline/corpus/demo/demo.jsonl.zst")
    parser.add_argument("--rows", type=int, default=900, help="conversations to read; 0 takes all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--start", default="auto", help="trainer.warm_start.layers")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--cache", default=".cache/draftline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    cache = Path(args.cache)
    target = load_target(TargetConfig(dtype="bfloat16"), cache)
    corpus = corpus_of(args.source, args.rows, target, cache, "algorithms-corpus")
    train = features(target, read_rows(corpus, "train"), LAYERS)
    held = read_rows(corpus, "heldout")[: args.prompts]
    prompts = [[int(t) for t in row.input_ids[: row.prompt_length]] for row in held]
    print(f"{len(train)} rows, features after {time.monotonic() - began:.0f} s", flush=True)

    config = EngineConfig(max_requests=8, max_context=512, rule="ratio", scheduler="fixed", threads=args.threads)
    engine = Engine(load_target(TargetConfig(), cache), config)
    plain = load_target(TargetConfig(), cache)  # the engine takes the other one over
    asked = [s.strip() for s in args.sides.split(",")]
    if unknown := sorted(set(asked) - set(SIDES)):
        parser.error(f"--sides {unknown[0]}: there are {', '.join(SIDES)}.")
    sides = [s for s in SIDES if s in asked]
    counts: dict[tuple[str, float], list[np.ndarray]] = {}
    for seed in range(args.seeds):
        for side in sides:
            draft = trained_draft(side, seed, args.steps, plain, corpus, train, args.start)
            for temperature in (0.0, 1.0):
                found = lengths(engine, draft, prompts, args.max_new_tokens, temperature)
                counts.setdefault((side, temperature), []).append(found)
                print(
                    f"seed {seed} {side:<20} temperature {temperature:g}: tau {tau(found):.3f} "
                    f"({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
    report: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items()}, "tau": {}, "ratio": {}}
    stacked = {k: np.stack(v) for k, v in counts.items()}
    print(f"\n{'side':<22}{'temperature':>12}{'tau':>8}{'95 %':>18}{'each seed':>24}")
    for (side, temperature), c in stacked.items():
        mean, low, high = interval(c)
        each = [round(tau(s), 3) for s in c]
        report["tau"][f"{side} t{temperature:g}"] = {"tau": mean, "low": low, "high": high, "seeds": each}
        print(f"{side:<22}{temperature:>12g}{mean:>8.3f}{f'[{low:.3f}, {high:.3f}]':>18}{each!s:>24}")
    print(f"\n{'ratio':<34}{'temperature':>12}{'':>8}{'95 %':>18}")
    for temperature in (0.0, 1.0):
        for other in sides[1:]:
            mean, low, high = interval(stacked[sides[0], temperature], stacked[other, temperature])
            name = f"{sides[0]} over {other}"
            report["ratio"][f"{name} t{temperature:g}"] = {"ratio": mean, "low": low, "high": high}
            print(f"{name:<34}{temperature:>12g}{mean:>8.3f}{f'[{low:.3f}, {high:.3f}]':>18}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
