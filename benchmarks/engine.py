"""The engine's own numbers at batch 1: plain decoding, steps of several tokens, drafts, long contexts, overhead.

python benchmarks/engine.py --draft outputs/demo/calibrated --json engine.json

Six comparisons, each in one process with its sides in turn and 95 % bootstrap intervals:

    generate  plain decoding against transformers' own generate, the same prompts
    steps     a target step over 2, 4 and 8 tokens against one over 1
    graphs    a step replayed from its CUDA graph against the same one launched operation by operation (on a GPU only)
    draft     with the draft against plain: greedy, and at temperature 1 under both rules
    context   a step at up to 4k tokens of context, and the steps of one output of 2k tokens, by quarters
    overhead  what of a step at batch 1 is neither the target's model, nor the draft's, nor verification
"""

from __future__ import annotations

import argparse
import collections
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from served import add_arguments, load, load_drafts, mixed_prompts, settings

from pipeline.artifact import write_json
from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request, verification
from pipeline.decoding.attention import StepLayout
from pipeline.decoding.proposers.drawing import Drawing
from pipeline.drafts.base import Draft
from pipeline.evaluation.benchmark import block_proposer
from pipeline.evaluation.metrics import bootstrap, rounded, totals
from pipeline.target import Target

PARTS = ("generate", "steps", "graphs", "draft", "context", "overhead")
Results = dict[str, dict[str, Any]]


def ratio(mine: list[float], base: list[float], args: argparse.Namespace) -> dict[str, float]:
    """Median of paired ratios with its interval."""
    pairs = [m / b for m, b in zip(mine, base, strict=True)]
    value, low, high = bootstrap(pairs, lambda x: float(np.median(x)), args.bootstrap, args.seed)
    return {"ratio": value, "low": low, "high": high}


def make_engine(target: Target, context: int, args: argparse.Namespace) -> Engine:
    """One request at a time."""
    return Engine(target, EngineConfig(max_requests=1, max_context=context, threads=args.threads, prefix_cache=False))


def timed(engine: Engine, request: Request) -> tuple[int, float]:
    """(tokens after the first, their seconds) of a request."""
    (done,) = engine.generate([request])
    if done.error:
        raise SystemExit(f"{request.id}: {done.error}")
    return done.metrics.decoded, done.metrics.decode_seconds


def generate(target: Target, engine: Engine, prompts: list[list[int]], args: argparse.Namespace) -> Results:
    """Whole answers, prompts included, as transformers' generate counts them; `target` is one of its own."""

    def theirs(prompt: list[int]) -> tuple[int, float]:
        began = time.perf_counter()
        ids = torch.tensor([prompt], device=target.device)
        with torch.inference_mode():
            out = target.model.generate(ids, max_new_tokens=args.max_new_tokens, do_sample=False)
        return out.shape[1] - len(prompt), time.perf_counter() - began

    def ours(prompt: list[int]) -> tuple[int, float]:
        began = time.perf_counter()
        (done,) = engine.generate([Request(prompt, args.max_new_tokens)])
        return len(done.token_ids), time.perf_counter() - began

    return compared({"transformers generate": theirs, "engine, plain": ours}, prompts, args)


def compared(
    sides: dict[str, Callable[[list[int]], tuple[int, float]]], prompts: list[list[int]], args: argparse.Namespace
) -> Results:
    """Tokens per second of each side, over the first one's; prompts are taken in turn, once more to warm up."""
    counted: dict[str, list[tuple[int, float]]] = {name: [] for name in sides}
    names = list(sides)
    for name in names:
        sides[name](prompts[0])
    for i, prompt in enumerate(prompts):
        turn = i % len(names)
        for name in (*names[turn:], *names[:turn]):
            counted[name].append(sides[name](prompt))
    base = list(zip(*counted[names[0]], strict=True))
    out: Results = {}
    for name, pairs in counted.items():
        tokens, seconds = zip(*pairs, strict=True)
        if not all(tokens):
            raise SystemExit(f"{name}: a prompt's answer has no token to time; raise --max-new-tokens.")
        found = totals(tokens, seconds, *base, args.bootstrap, args.seed)  # type: ignore[arg-type]
        out[name] = {
            "tokens_per_second": sum(tokens) / sum(seconds),
            "ratio": found["totals"],
            "low": found["totals_low"],
            "high": found["totals_high"],
        }
    return out


def steps(engine: Engine, args: argparse.Namespace) -> Results:
    """Milliseconds of steps over several tokens of one request, at 64 tokens of context."""
    sizes, times = (1, 2, 4, 8), {}  # type: ignore[var-annotated]
    for _ in range(args.repeats + 2):
        for n in sizes:
            times.setdefault(n, []).append(engine.runner.time_step(n, 64, n))
    times = {n: t[2:] for n, t in times.items()}
    return {
        f"{n} tokens": {"milliseconds": 1000 * float(np.median(t)), **ratio(t, times[1], args)}
        for n, t in times.items()
    }


def graphs(target: Target, args: argparse.Namespace) -> Results:
    """Steps of one request's sizes behind short and long contexts, recorded and launched."""
    most = min(args.context, (getattr(target.config, "max_position_embeddings", None) or args.context + 64) - 64)
    runner = make_engine(target, most + 64, args).runner
    sizes, contexts = runner.buckets, sorted({min(512, most), most})
    times: dict[tuple[int, int, bool], list[float]] = {}
    for _ in range(args.repeats + 2):
        for case in itertools.product(sizes, contexts, (True, False)):
            runner.buckets = sizes if case[2] else ()
            times.setdefault(case, []).append(runner.time_step(case[0], case[1], sizes[-1]))
    out: Results = {}
    for n, context in itertools.product(sizes, contexts):
        recorded, launched = times[n, context, True][2:], times[n, context, False][2:]
        out[f"{n} tokens behind {context}"] = {
            "milliseconds": 1000 * float(np.median(recorded)),
            **ratio(launched, recorded, args),
        }
    return out


def drafted(engine: Engine, drafts: dict[str, Draft], prompts: list[list[int]], args: argparse.Namespace) -> Results:
    """Decode tokens per second, first token excluded, with the draft and plainly."""
    out: Results = {}
    made = {rule: block_proposer(drafts["draft"], engine.config, rule) for rule in ("coupled", "ratio")}
    plain, shared = engine.proposer, engine.step_cost or engine.profile()
    costs = {key: shared.copy(draft=0.0) for key in ("plain", *made)}

    def side(key: str, rule: str, temperature: float) -> Callable[[list[int]], tuple[int, float]]:
        def decode(prompt: list[int]) -> tuple[int, float]:
            engine.step_cost = costs[key]
            engine.set_proposer(made.get(key, plain))
            engine.set_schedule("asynchronous" if rule == "ratio" else "global", rule=rule)
            return timed(engine, Request(prompt, args.max_new_tokens, temperature=temperature, seed=args.seed))

        return decode

    for title, temperature, rules in (("greedy", 0.0, ("coupled",)), ("temperature 1", 1.0, ("coupled", "ratio"))):
        sides = {f"plain, {title}": side("plain", "coupled", temperature)}
        sides |= {f"draft, {title}, {rule}": side(rule, rule, temperature) for rule in rules}
        out |= compared(sides, prompts, args)
    engine.set_proposer(plain)
    engine.set_schedule("global", rule="coupled")
    return out


def context(target: Target, prompt: list[int], args: argparse.Namespace) -> Results:
    """Milliseconds of a one-token step, by tokens of context before it."""
    limit = getattr(target.config, "max_position_embeddings", None) or args.context + 8
    most = min(args.context, limit - 8)
    output = min(args.output, limit - len(prompt))
    engine = make_engine(target, max(most + 8, len(prompt) + output), args)
    lengths = sorted({n for n in (64, 512, 1024, 2048, 4096) if n < most} | {most})
    times: dict[int, list[float]] = {}
    for _ in range(args.repeats + 2):
        for n in lengths:
            times.setdefault(n, []).append(engine.runner.time_step(1, n, 1))
    times = {n: t[2:] for n, t in times.items()}
    out: Results = {
        f"{n} of context": {"milliseconds": 1000 * float(np.median(t)), **ratio(t, times[lengths[0]], args)}
        for n, t in times.items()
    }
    spent: list[float] = []
    engine.submit(Request(prompt, output, ignore_eos=True))
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        spent.append(time.perf_counter() - began)
    quarters = np.array_split(np.array(spent[2:]), 4)
    for i, part in enumerate(quarters):
        value, low, high = bootstrap(part.tolist(), lambda x: float(np.median(x)), args.bootstrap, args.seed)
        base = float(np.median(quarters[0]))
        name = f"output of {output}, quarter {i + 1}"
        out[name] = {"milliseconds": 1000 * value, "ratio": value / base, "low": low / base, "high": high / base}
    return out


class Watch:
    """Seconds spent in methods by kind, the device's included; each without what other watched methods took in it."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._wait = wait
        self._inside: list[float] = []  # of each method that runs, the seconds of watched ones in it
        self._undo: list[Callable[[], None]] = []

    def add(self, owner: Any, method: str, kind: str) -> None:
        """Times a method of an object or class from now on."""
        inner, own = getattr(owner, method), method in vars(owner)

        def call(*args: Any, **settings: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            result = inner(*args, **settings)
            if len(self._inside) == 1:  # waiting within another would slow that down
                self._wait()
            took = time.perf_counter() - began
            self.seconds[kind] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took
            return result

        setattr(owner, method, call)
        self._undo.append(lambda: setattr(owner, method, inner) if own else delattr(owner, method))

    def stop(self) -> None:
        """Leaves all methods as they were."""
        while self._undo:
            self._undo.pop()()


def _watch(engine: Engine) -> Watch:
    """A watch of what a step is for: `target` and `draft` are their models alone (with the drawing of the block), and
    `verify` the kernel. What the models' attention lays out within them is `layout`, which is none of these."""
    device = engine.target.device
    watch = Watch(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    for owner, kind in ((engine.runner, "target"), (engine.proposer, "draft")):
        if (replays := getattr(owner, "_replays", None)) is not None:
            watch.add(replays, "run", kind)
    watch.add(type(engine.target.family), "hidden", "target")  # its objects are frozen
    watch.add(engine.target.model.get_output_embeddings(), "forward", "target")
    watch.add(verification, "verify", "verify")
    for method in ("_lay_out", "_on_device"):  # of steps that are launched
        watch.add(StepLayout, method, "layout")
    draft = getattr(engine.proposer, "draft", None)
    if draft is not None:
        for method in ("context", "context_kv", "blocks", "advance", "logits", "markov_step", "confidence"):
            if hasattr(draft, method):
                watch.add(draft, method, "draft")
        for method in ("draw", "in_one"):
            watch.add(Drawing, method, "draft")
        if (head := getattr(engine.proposer, "_lm_head", None)) is not None:
            watch.add(head, "forward", "draft")
    return watch


def overhead(engine: Engine, drafts: dict[str, Draft], prompts: list[list[int]], args: argparse.Namespace) -> Results:
    """Shares of a step: the target's model, the draft's, verification, and the rest."""
    out: Results = {}
    shared = engine.step_cost or engine.profile()
    sides = {"plain": engine.proposer}
    if drafts:
        sides["draft"] = block_proposer(drafts["draft"], engine.config)
    for name, proposer in sides.items():
        engine.step_cost = shared.copy(draft=0.0)
        engine.set_proposer(proposer)
        rows: list[dict[str, float]] = []
        engine.generate([Request(prompts[0], min(16, args.max_new_tokens))])
        watch = _watch(engine)
        try:
            for prompt in prompts:
                engine.submit(Request(prompt, args.max_new_tokens))
                while not any(s.prefilled for s in engine.batch.running):
                    engine.step()
                watch.seconds.clear()
                began, count = time.perf_counter(), 0
                while engine.has_work:
                    engine.step()
                    count += 1
                whole = time.perf_counter() - began
                if count:
                    inside = {k: watch.seconds[k] / whole for k in ("target", "draft", "verify")}
                    rows.append({"milliseconds": 1000 * whole / count, **inside, "outside": 1 - sum(inside.values())})
        finally:
            watch.stop()
        if not rows:
            raise SystemExit("overhead: no prompt decoded past its first token; raise --max-new-tokens.")
        value, low, high = bootstrap([r["outside"] for r in rows], lambda x: float(x.mean()), args.bootstrap, args.seed)
        mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
        out[name] = {**mean, "ratio": value, "low": low, "high": high}
    engine.set_proposer(sides["plain"])
    return out


def show(part: str, found: Results) -> None:
    """A table of a part: its leading number, and the ratio with its interval."""
    first = next(iter(next(iter(found.values()))))
    label = "outside" if part == "overhead" else "ratio"
    print(f"\n{part:<34}{first.replace('_', ' '):>20}{label:>9}{'95 %':>18}")
    for name, r in found.items():
        shares = "  ".join(f"{k} {r[k]:.1%}" for k in ("target", "draft", "verify") if k in r)
        interval = f"[{r['low']:.3f}, {r['high']:.3f}]"
        print(f"{name:<34}{r[first]:>20.2f}{r['ratio']:>9.3f}{interval:>18}  {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=40, help="timings of a step")
    parser.add_argument("--context", type=int, default=4096, help="the longest context timed")
    parser.add_argument("--output", type=int, default=2048, help="tokens of the long output")
    args = parser.parse_args()
    parts = [p.strip() for p in args.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}.")
    if "draft" in parts and not args.draft:
        print("no --draft: the part `draft` is left out")
        parts.remove("draft")
    torch.set_num_threads(args.threads)
    target = load(args)
    drafts = load_drafts(args, target)
    prompts = mixed_prompts(target, args.prompts, args.seed)
    engine = make_engine(target, max(map(len, prompts)) + args.max_new_tokens + 64, args)
    if "graphs" in parts and not engine.runner.buckets:
        print("no steps are recorded, as on a CUDA device: the part `graphs` is left out")
        parts.remove("graphs")
    run: dict[str, Callable[[], Results]] = {
        "generate": lambda: generate(load(args), engine, prompts, args),
        "steps": lambda: steps(engine, args),
        "graphs": lambda: graphs(target, args),
        "draft": lambda: drafted(engine, drafts, prompts, args),
        "context": lambda: context(target, prompts[0], args),
        "overhead": lambda: overhead(engine, drafts, prompts, args),
    }
    report: dict[str, Any] = {"settings": settings(args), "results": {}}
    for part in parts:
        report["results"][part] = run[part]()
        show(part, report["results"][part])
    report["hardware"] = (engine.step_cost or engine.profile()).hardware
    if args.json:
        write_json(args.json, rounded(report))


if __name__ == "__main__":
    main()
