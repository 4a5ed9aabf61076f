"""Speculation under load: tokens per second at 1 to 64 concurrent requests, plain, n-gram and with a draft.

python benchmarks/load.py --draft outputs/demo/calibrated --levels 1,2,4,8 --json low.json
python benchmarks/load.py --draft outputs/demo/calibrated --levels 16,32 --passes 3 --json high.json
python benchmarks/load.py --join low.json high.json --plot load.svg

Every arm has an engine of its own, over the same target and the same prompts (chat, math and code in turn), in one
process. They take turns step by step, always the one that has decoded for the least time, so that a machine that gets
slower does so for all. A pass keeps so many requests in flight and counts an arm's own tokens and seconds while all its
places are taken, prompts included. An arm's ratio is over plain decoding of the same passes, with a 95 % bootstrap
interval over passes.
`draft fixed` verifies whole blocks whatever they cost; `draft` is scheduled, and drafts only where it is expected to
pay. `mean l`, `accepted` (tokens) and `skipped` are per request and step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from served import add_arguments, load, load_drafts, mixed_prompts, settings

from pipeline.artifact import write_json
from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request, make_proposer
from pipeline.decoding.step_cost import device_name
from pipeline.evaluation.benchmark import Arm, proposers
from pipeline.evaluation.metrics import rounded, totals

ARMS = (Arm("none", "none"), Arm("ngram", "ngram"), Arm("draft fixed", "draft", "fixed"), Arm("draft", "draft"))


@dataclasses.dataclass
class Pass:
    """What one pass of an arm did while all its places were taken.

    clock: seconds of its steps so far, and `seconds` those of them that count. per_user: tokens/s of each request
    finished then, on that clock; rounds, skipped, verified and accepted are theirs too.
    """

    tokens: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    per_user: list[float] = dataclasses.field(default_factory=list)
    rounds: int = 0
    skipped: int = 0
    verified: int = 0
    accepted: int = 0


def drive(
    engine: Engine, requests: list[Request], users: int, out: Pass, wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Decodes requests, `users` at a time, each followed by the next; a step at a time, as often as it is asked.

    Args:
        wait: for all that the device was asked to do in a step, so that the next arm's doesn't.
    """
    waiting, flying, full = list(reversed(requests)), 0, True
    first: dict[str, float] = {}
    while waiting or engine.has_work:
        began = time.perf_counter()
        while waiting and flying < users:
            engine.submit(waiting.pop())
            flying += 1
        events = engine.step()
        wait()
        took = time.perf_counter() - began
        out.clock += took
        out.seconds += took if full else 0.0
        for event in events:
            first.setdefault(event.request_id, out.clock)
            if full:
                out.tokens += len(event.token_ids)
            if event.finished is None:
                continue
            flying -= 1
            m = event.finished.metrics
            if event.finished.error:
                raise SystemExit(f"{event.request_id}: {event.finished.error}")
            if not full:
                continue
            since = out.clock - first[event.request_id]
            if m.decoded and since:
                out.per_user.append(m.decoded / since)
            out.rounds += m.target_steps
            out.skipped += m.skipped
            out.verified += m.verified
            out.accepted += m.accepted
        full = full and (bool(waiting) or flying == users)
        yield


def take_turns(runs: dict[str, Iterator[None]], passes: dict[str, Pass]) -> None:
    """Drives all to their end, always the one that has decoded for the least time; `runs` is empty then."""
    while runs:
        name = min(runs, key=lambda n: passes[n].clock)
        if next(runs[name], runs) is runs:
            del runs[name]


def measure(
    engines: dict[str, Engine], arms: list[Arm], levels: list[int], prompts: list[list[int]], args: argparse.Namespace
) -> dict[int, dict[str, list[Pass]]]:
    """Passes by level and arm, each pass over prompts of its own.

    Args:
        engines: by the arms' names, each with its arm's proposer.
    """
    first = next(iter(engines.values()))
    pages = {name: engine.runner.pool.pages for name, engine in engines.items()}
    if len(set(pages.values())) > 1:
        raise SystemExit(
            f"The arms' KV pools have different numbers of pages ({pages}): free memory, or lower --levels."
        )
    wait: Callable[[], None] = lambda: None  # noqa: E731
    if first.target.device.type == "cuda":
        wait = functools.partial(torch.cuda.synchronize, first.target.device)
    for arm in arms:
        engines[arm.name].set_schedule(arm.scheduler, rule=arm.rule)
    shared = first.profile()
    for engine in engines.values():
        if engine is not first and engine.runner.buckets:
            engine.profile()  # records its steps
    done: dict[int, dict[str, list[Pass]]] = {}

    def together(users: int, texts: list[list[int]], tokens: int) -> dict[str, Pass]:
        passes = {name: Pass() for name in engines}
        runs = {}
        for name, engine in engines.items():
            asked = [Request(p, tokens, temperature=args.temperature, seed=i) for i, p in enumerate(texts)]
            runs[name] = drive(engine, asked, users, passes[name], wait)
        take_turns(runs, passes)
        return passes

    for users in levels:
        size = users * args.requests_per_user
        # What first use costs is no part of what drafting costs: the second of two warm passes is learned from.
        for _ in range(2):
            for engine in engines.values():
                engine.step_cost = shared.copy(draft=0.0)
            together(users, prompts[:users], min(12, args.max_new_tokens))
        for engine in engines.values():
            engine.step_cost = shared.copy_with_draft_of(engine.step_cost or shared)
        done[users] = {a.name: [] for a in arms}
        for i in range(args.passes):
            passes = together(users, prompts[i * size : (i + 1) * size], args.max_new_tokens)
            for name, one in passes.items():
                done[users][name].append(one)
        print(f"{users} concurrent: {args.passes} passes of {size} requests done", flush=True)
    return done


def summarise(passes: list[Pass], base: list[Pass], args: argparse.Namespace) -> dict[str, float]:
    """An arm's numbers at one level."""
    rounds = sum(p.rounds for p in passes)
    columns = [[getattr(p, k) for p in ps] for ps in (passes, base) for k in ("tokens", "seconds")]
    return {
        "tokens_per_second": sum(p.tokens for p in passes) / sum(p.seconds for p in passes),
        "per_user": float(np.median([r for p in passes for r in p.per_user])),
        **totals(*columns, args.bootstrap, args.seed),
        "mean_length": sum(p.verified for p in passes) / max(rounds, 1),
        "accepted": sum(p.accepted for p in passes) / max(rounds, 1),
        "skipped": sum(p.skipped for p in passes) / max(rounds, 1),
    }


def summaries(
    done: dict[int, dict[str, list[Pass]]], args: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """By level and arm."""
    return {
        str(users): {name: summarise(passes, of["none"], args) for name, passes in of.items()}
        for users, of in done.items()
    }


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table."""
    print(
        f"\n{'users':>5}  {'arm':<15}{'tokens/s':>10}{'per user':>10}{'over plain':>12}{'95 %':>18}{'mean l':>8}"
        f"{'accepted':>10}{'skipped':>9}"
    )
    for users, of in results.items():
        for name, r in of.items():
            interval = f"[{r['totals_low']:.3f}, {r['totals_high']:.3f}]"
            print(
                f"{users:>5}  {name:<15}{r['tokens_per_second']:>10.1f}{r['per_user']:>10.1f}{r['totals']:>12.3f}"
                f"{interval:>18}{r['mean_length']:>8.2f}{r['accepted']:>10.2f}{r['skipped']:>9.2f}"
            )


def plot(results: dict[str, dict[str, dict[str, float]]], file: Any) -> None:
    """Throughput against per-user speed, and the mean verified length against load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    levels = [int(n) for n in results]
    for arm in next(iter(results.values())):
        rows = [of[arm] for of in results.values()]
        left.plot([r["per_user"] for r in rows], [r["tokens_per_second"] for r in rows], "o-", label=arm)
        if arm != "none":
            right.plot(levels, [r["mean_length"] for r in rows], "o-", label=arm)
    left.set(xlabel="tokens/s of a user (median)", ylabel="tokens/s of all")
    right.set(xlabel="concurrent requests", ylabel="draft tokens verified per request and step", xscale="log")
    right.set_xticks(levels, [str(n) for n in levels])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--levels", default="1,2,4,8", help="concurrent requests")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--requests-per-user", type=int, default=2, help="requests of a pass, by concurrent ones")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--arms", default=",".join(a.name for a in ARMS), help="none is always among them")
    parser.add_argument("--plot", help="FILE.png or FILE.svg")
    parser.add_argument("--join", type=Path, nargs="+", default=[], help="measure nothing, show these reports as one")
    args = parser.parse_args()
    if args.join:
        reports = [json.loads(f.read_text()) for f in args.join]
        if len(machines := {r["hardware"] for r in reports}) > 1:
            parser.error(f"--join: these reports are of several machines ({', '.join(sorted(machines))}).")
        joined = {level: of for r in reports for level, of in r["results"].items()}
        joined = {level: joined[level] for level in sorted(joined, key=int)}
        show(joined)
        if args.plot:
            plot(joined, args.plot)
        return
    wanted = {"none", *(a.strip() for a in args.arms.split(","))}
    unknown = wanted - {a.name for a in ARMS}
    if unknown:
        parser.error(f"--arms: {', '.join(sorted(unknown))} is not one of {', '.join(a.name for a in ARMS)}.")
    levels = sorted({int(n) for n in args.levels.split(",")})
    target = load(args)
    drafts = load_drafts(args, target)
    arms = [a for a in ARMS if a.name in wanted and (a.proposer != "draft" or drafts)]
    prompts = mixed_prompts(target, args.passes * max(levels) * args.requests_per_user, args.seed)
    room = max(map(len, prompts)) + args.max_new_tokens + 64
    config = EngineConfig(
        max_requests=max(levels),
        max_context=max(512, room),
        max_queue=2 * max(levels),
        threads=args.threads,
        prefix_cache=False,
    )
    engines = {}
    for arm in arms:
        proposer = proposers([arm], drafts, config)[arm.key] if drafts else make_proposer(arm.proposer)
        engines[arm.name] = Engine(target, config, proposer)
    done = measure(engines, arms, levels, prompts, args)
    results = summaries(done, args)
    show(results)
    if args.json:
        hardware = device_name(target.device)
        write_json(args.json, rounded({"settings": settings(args), "hardware": hardware, "results": results}))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
