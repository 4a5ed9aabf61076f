"""What the extraction stage keeps of the target's own speed: the bare forward against the stage through Ray Data.

python benchmarks/extract.py --rows 96 --json extract.json

Both see the same rows in the same batches, by turns, `--repeats` times. The bare loop only runs the backbone with its
taps set; the stage also casts, checks, writes, hashes and hands results back. Steady state leaves the first shard of
each pass out; start-up (loading the target, and for the stage Ray's actors) is reported beside it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import write_json
from pipeline.config import CorpusConfig, FeaturesConfig, TargetConfig
from pipeline.corpus.build import build_corpus, read_rows
from pipeline.corpus.rows import TokenRow
from pipeline.features.extract import extract
from pipeline.features.forward import batches
from pipeline.target import Target, features_of, load_identity, load_target, load_tokenizer

_BOOTSTRAP = 2000


def padded(rows: list[TokenRow]) -> torch.Tensor:
    """int64[B, S] of token ids, padded on the right."""
    ids = [torch.as_tensor(r.input_ids).long() for r in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def bare(target: Target, shards: list[list[TokenRow]], config: FeaturesConfig) -> list[float]:
    """Seconds of each shard's forwards alone."""
    torch.set_num_threads(config.threads)
    spent = []
    for rows in shards:
        planned = [[rows[i] for i in batch] for batch in batches(rows, config.batch_tokens)]
        inputs = [(padded(batch), [len(r.input_ids) for r in batch]) for batch in planned]
        began = time.perf_counter()
        for ids, lengths in inputs:
            features_of(target, config.target_layer_ids, ids, lengths)
        spent.append(time.perf_counter() - began)
    return spent


def staged(features: Path, shards: int) -> tuple[list[float], float]:
    """Seconds from each shard's note to the next one's (by shard; 0 for the first), and when the first was written."""
    written = [(features / f"shard-{n:05d}.safetensors.json").stat().st_mtime_ns / 1e9 for n in range(shards)]
    order = sorted(range(shards), key=written.__getitem__)
    gaps = [0.0] * shards
    for before, after in zip(order, order[1:], strict=False):
        gaps[after] = written[after] - written[before]
    return gaps, min(written)


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Ratio of summed bare to summed stage seconds, with its 95% bootstrap interval over (pass, shard) pairs."""

    def ratio(sample: list[tuple[float, float]]) -> float:
        return sum(b for b, _ in sample) / sum(s for _, s in sample)

    rng = random.Random(0)
    drawn = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(_BOOTSTRAP))
    return ratio(pairs), drawn[int(0.025 * _BOOTSTRAP)], drawn[int(0.975 * _BOOTSTRAP)]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs both by turns; the report as plain values."""
    import ray

    cache = Path(args.cache)
    source = TargetConfig(path=args.target)
    tokenizer = load_tokenizer(source, cache)
    corpus = folder / "corpus"
    settings = CorpusConfig(source=args.corpus, max_rows=args.rows, heldout_fraction=0.0)
    build_corpus(settings, tokenizer, load_identity(source, cache, tokenizer).as_dict(), corpus)
    rows = read_rows(corpus, "train")
    config = FeaturesConfig(
        target_layer_ids=[int(i) for i in args.layers.split(",")],
        shard_rows=args.shard_rows,
        batch_tokens=args.batch_tokens,
        threads=args.threads,
        compute_dtype=args.compute_dtype,
    )
    shards = [rows[i : i + config.shard_rows] for i in range(0, len(rows), config.shard_rows)]
    if len(shards) < 3:
        raise SystemExit(f"{len(rows)} rows make {len(shards)} shards; give more --rows or fewer --shard-rows.")
    tokens = [sum(len(r.input_ids) for r in shard) for shard in shards]
    began = time.perf_counter()
    target = load_target(TargetConfig(path=args.target, dtype=args.compute_dtype), cache)
    loading = time.perf_counter() - began
    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    pairs, steady_tokens, stage_startup, stage_wall, bare_wall = [], 0, [], [], []
    for number in range(args.repeats):
        plain = bare(target, shards, config)
        began_at = time.time()
        extract(config, source, corpus, folder / f"features-{number}", cache)
        stage_wall.append(time.time() - began_at)
        through, first = staged(folder / f"features-{number}", len(shards))
        stage_startup.append(first - began_at)
        bare_wall.append(sum(plain))
        kept = [n for n, gap in enumerate(through) if gap > 0]
        pairs += [(plain[n], through[n]) for n in kept]
        steady_tokens += sum(tokens[n] for n in kept)
    ray.shutdown()
    ratio, low, high = interval(pairs)
    every = sum(tokens) * args.repeats
    return {
        "target": args.target,
        "compute_dtype": args.compute_dtype,
        "threads": args.threads,
        "rows": len(rows),
        "shards": len(shards),
        "tokens": sum(tokens),
        "repeats": args.repeats,
        "steady": {
            "bare_tokens_per_second": steady_tokens / sum(b for b, _ in pairs),
            "stage_tokens_per_second": steady_tokens / sum(s for _, s in pairs),
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
        },
        "with_startup": {
            "bare_load_seconds": loading,
            "stage_seconds_to_first_shard": sum(stage_startup) / args.repeats,
            "bare_tokens_per_second": every / (sum(bare_wall) + args.repeats * loading),
            "stage_tokens_per_second": every / sum(stage_wall),
        },
    }


def show(report: dict[str, Any]) -> None:
    steady, start = report["steady"], report["with_startup"]
    print(f"{'tokens/s':<14}{'bare loop':>12}{'stage':>12}{'ratio':>8}")
    for name, row in (("steady", steady), ("with start-up", start)):
        bare_rate, stage_rate = row["bare_tokens_per_second"], row["stage_tokens_per_second"]
        print(f"{name:<14}{bare_rate:>12.0f}{stage_rate:>12.0f}{stage_rate / bare_rate:>8.2f}")
    print(f"steady ratio, 95 % interval: {steady['ratio_low']:.2f} to {steady['ratio_high']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--corpus", default="pipeline/corpus/demo/demo.jsonl.zst", help="conversations")
    parser.add_argument("--cache", default=".cache/draftline", help="where the target is kept")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--layers", default="1,8,14,20,27", help="0-based decoder layers")
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the report here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, Path(folder))
    show(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
