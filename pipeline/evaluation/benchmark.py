"""Arms of a comparison, decoded by one engine in one process, interleaved prompt by prompt.

Plain decoding is the `none` arm of the same engine. The order of arms rotates from prompt to prompt, so that drift of
the machine's speed falls on all alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config import BenchmarkConfig, EngineConfig
from pipeline.corpus.rows import ChatFormat, TokenRow
from pipeline.decoding import Completion, Engine, Request, RoundTrace, StepCost, make_proposer
from pipeline.drafts.base import Draft
from pipeline.errors import DraftlineError
from pipeline.evaluation.metrics import positions, speedup, summed, totals

Proposers = dict[tuple[str, str], Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to decode: a proposer (none, ngram, or a draft by its name here), scheduler, rule, sampled or greedy.

    baseline: the arm that it is compared with.
    """

    name: str
    proposer: str
    scheduler: str = "global"
    rule: str = "coupled"
    sampled: bool = False
    baseline: str = "none"

    @property
    def key(self) -> tuple[str, str]:
        """What its proposer is kept under: (name, rule), as a neural draft's proposals depend on the rule."""
        return self.proposer, "" if self.proposer in ("none", "ngram") else self.rule


COUPLED = "draft t1 coupled"
"""The arm that shows sampled text to be plain decoding's, where the engine's own rule is not the coupled one."""


def report_arms(engine: EngineConfig) -> tuple[Arm, ...]:
    """A report's arms: `draft` and `draft t1` by the engine's own scheduler and rule, as serving has them; beside them
    plain decoding, n-gram lookup, whole blocks, the ratio rule, and where the engine's rule is another, the coupled."""
    own = engine.scheduler, engine.rule
    arms = (
        Arm("none", "none"),
        Arm("ngram", "ngram"),
        Arm("draft", "draft", *own),
        Arm("draft fixed", "draft", "fixed", engine.rule),
        Arm("none t1", "none", sampled=True, baseline="none t1"),
        Arm("draft t1", "draft", *own, sampled=True, baseline="none t1"),
        Arm("draft t1 ratio", "draft", "early_stop", "ratio", sampled=True, baseline="none t1"),
    )
    if engine.rule == "coupled":
        return arms
    return (*arms, Arm(COUPLED, "draft", sampled=True, baseline="none t1"))


def pick_prompts(rows: Sequence[TokenRow], calibrate: int, evaluate: int, seed: int) -> tuple[list[TokenRow], ...]:
    """Disjoint (calibration, evaluation) rows, spread over sources, a function of rows and seed.

    They are taken from the two ends: with `evaluate` raised, a draft is measured on none of what it was calibrated on.
    Where there are too few, calibration has its own and evaluation what is left, one at least.

    Answers of one prompt count once: as two entries they would be calibrated and measured on the same text, or taken
    for independent by the bootstrap.
    """
    by_source: dict[str, list[TokenRow]] = {}
    seen: set[tuple[int, ...]] = set()
    for row in sorted(rows, key=lambda r: r.sample_id):
        prompt = tuple(int(t) for t in row.input_ids[: row.prompt_length])
        if prompt in seen:
            continue
        seen.add(prompt)
        by_source.setdefault(row.source, []).append(row)
    generator = np.random.default_rng(seed)
    for group in by_source.values():
        generator.shuffle(group)  # type: ignore[arg-type]
    spread: list[TokenRow] = []
    groups = [by_source[s] for s in sorted(by_source)]
    for i in range(max(map(len, groups), default=0)):
        spread += [g[i] for g in groups if i < len(g)]
    ends = max(1, len(spread) - calibrate)
    return spread[ends:], spread[: min(evaluate, ends)]


def block_proposer(draft: Draft, engine: EngineConfig, rule: str = "coupled") -> Any:
    """The draft as the engine's proposer."""
    return make_proposer(
        draft.config.algorithm,
        draft,
        rule=rule,
        pack=engine.prepack,
    )


def proposers(arms: Sequence[Arm], drafts: Mapping[str, Draft], engine: EngineConfig) -> Proposers:
    """Every proposer the arms need, by `Arm.key`; ngram looks as far ahead as the first draft."""
    made: Proposers = {}
    for name, rule in dict.fromkeys(a.key for a in arms):
        if name in drafts:
            made[name, rule] = block_proposer(drafts[name], engine, rule)
        elif name == "ngram":
            made[name, rule] = make_proposer("ngram", block_size=next(iter(drafts.values())).config.block_size)
        else:
            made[name, rule] = make_proposer(name)
    return made


def collect_rounds(
    engine: Engine, proposer: Any, rows: Sequence[TokenRow], config: BenchmarkConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Raw confidences [N, K] and accepted counts [N] of whole blocks, greedy and sampled alike."""
    engine.set_proposer(proposer)
    engine.set_schedule("fixed")
    raw: list[np.ndarray] = []
    accepted: list[np.ndarray] = []

    def keep(trace: RoundTrace) -> None:
        if trace.raw_confidence is not None:
            # What lies behind a text's end is not what the draft is for.
            ended = trace.emitted <= trace.accepted
            whole = ((trace.lengths == trace.raw_confidence.shape[1]) & ~ended).numpy()
            raw.append(trace.raw_confidence.numpy()[whole])
            accepted.append(trace.accepted.numpy()[whole])

    stops = chat_stops(engine)
    engine.on_round = keep
    try:
        requests = [_request(r, i, config, t, stops) for t in (0.0, config.temperature) for i, r in enumerate(rows)]
        engine.generate(requests)
    finally:
        engine.on_round = None
    block = proposer.block_size
    if not raw:
        return np.zeros((0, block)), np.zeros(0, dtype=np.int64)
    return np.concatenate(raw), np.concatenate(accepted)


def run_arms(
    engine: Engine,
    arms: Sequence[Arm],
    made: Proposers,
    rows: Sequence[TokenRow],
    config: BenchmarkConfig,
    shown: tuple[str, str],
) -> tuple[dict[str, list[Completion]], dict[tuple[str, str], StepCost]]:
    """Decodes every prompt with every arm, one request at a time.

    Args:
        made: what `proposers` returned. shown: the two arms whose speeds the progress lines tell.
    Returns:
        (completions by arm, in the order of rows; what a step cost with each proposer).
    Raises:
        DraftlineError: a request ended with an error, or no prompt was decoded past its first token.
    """
    done: dict[str, list[Completion]] = {a.name: [] for a in arms}
    # The engine learns what drafting costs as it runs: each proposer has its own table, or n-gram's near-zero cost
    # would mix into the neural draft's and the schedule would be neither's.
    costs: dict[tuple[str, str], StepCost] = {}
    stops = chat_stops(engine)
    warm = dataclasses.replace(config, max_new_tokens=min(8, config.max_new_tokens))
    shared = engine.step_cost or engine.profile()
    for _ in range(2):  # The first pass pays for what is made on first use; the second learns from the rest.
        costs = {key: shared.copy(draft=0.0) for key in made}
        for arm in arms:
            engine.step_cost = costs[arm.key]
            _decode(engine, arm, made, rows[0], 0, warm, stops)
    # What first use cost is no part of a step's cost.
    costs = {key: shared.copy_with_draft_of(cost) for key, cost in costs.items()}
    began = time.monotonic()
    for i, row in enumerate(rows):
        turn = i % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):
            engine.step_cost = costs[arm.key]
            done[arm.name].append(_decode(engine, arm, made, row, i, config, stops))
        left = (time.monotonic() - began) / (i + 1) * (len(rows) - i - 1)
        base, mine = ((a, done[a][i]) for a in shown)
        print(
            f"evaluate: prompt {i + 1}/{len(rows)}, {base[0]} {rate(base[1]):.1f} tokens/s, {mine[0]} "
            f"{rate(mine[1]):.1f} (tau {mine[1].metrics.tau:.2f}), {left:.0f} s left",
            flush=True,
        )
    if not any(c.metrics.decoded for c in done[shown[0]]):
        raise DraftlineError(
            f"None of {len(rows)} held-out prompts was decoded past its first token, so there is no speed to compare: "
            f"raise benchmark.max_new_tokens (now {config.max_new_tokens}) or take other prompts."
        )
    return done, costs


def summarise(
    done: dict[str, list[Completion]], rows: Sequence[TokenRow], config: BenchmarkConfig, arms: Sequence[Arm]
) -> dict[str, Any]:
    """Per arm: tau, acceptance, tokens/s, speedup with interval, positions, lengths, agreement with its baseline."""
    out: dict[str, Any] = {}
    for arm in arms:
        mine, base = done[arm.name], done[arm.baseline]
        metrics = [c.metrics for c in mine]
        steps, decoded = sum(m.target_steps for m in metrics), sum(m.decoded for m in metrics)
        drafted, verified, accepted = (sum(getattr(m, k) for m in metrics) for k in ("drafted", "verified", "accepted"))
        usable = [i for i, (a, b) in enumerate(zip(mine, base, strict=True)) if a.metrics.decoded and b.metrics.decoded]
        rates = [rate(mine[i]) for i in usable]
        base_rates = [rate(base[i]) for i in usable]
        work = [[c[i].metrics for i in usable] for c in (mine, base)]
        tokens, seconds = (
            [[f(m) for m in ms] for ms in work] for f in (lambda m: m.decoded, lambda m: m.decode_seconds)
        )
        out[arm.name] = {
            "proposer": arm.proposer,
            "scheduler": arm.scheduler,
            "rule": arm.rule,
            "temperature": config.temperature if arm.sampled else 0.0,
            "tau": decoded / steps if steps else 1.0,
            "accept_rate": accepted / drafted if drafted else 0.0,
            "verified_accept_rate": accepted / verified if verified else 0.0,
            "tokens_per_second": decoded / sum(m.decode_seconds for m in metrics),
            "draft_share": sum(m.draft_seconds for m in metrics) / sum(m.decode_seconds for m in metrics),
            **speedup(rates, base_rates, config.bootstrap, config.seed),
            **totals(tokens[0], seconds[0], tokens[1], seconds[1], config.bootstrap, config.seed),
            "same_text": sum(a.token_ids == b.token_ids for a, b in zip(mine, base, strict=True)),
            "prompts": len(mine),
            "timed": len(usable),  # the others ended at their first token, which prefill gives
            "positions": positions(summed([m.offered for m in metrics]), summed([m.accepted_at for m in metrics])),
            "lengths": dict(sorted(Counter(n for m in metrics for n in m.lengths).items())),
            "per_prompt": [
                {
                    "sample_id": rows[i].sample_id,
                    "source": rows[i].source,
                    "tokens_per_second": rate(mine[i]),
                    "speedup": rate(mine[i]) / rate(base[i]),
                    "tau": mine[i].metrics.tau,
                    "tokens": len(mine[i].token_ids),
                }
                for i in usable
            ],
        }
    return out


def chat_stops(engine: Engine) -> tuple[int, ...]:
    """Tokens at which the answers of served chats end; TemplateError without a chat template."""
    return ChatFormat(engine.target.tokenizer).stop_ids(engine.target.eos_ids)


def _decode(
    engine: Engine,
    arm: Arm,
    made: Proposers,
    row: TokenRow,
    i: int,
    config: BenchmarkConfig,
    stops: tuple[int, ...],
) -> Completion:
    engine.set_proposer(made[arm.key])
    engine.set_schedule(arm.scheduler, rule=arm.rule)
    completion = engine.generate([_request(row, i, config, config.temperature if arm.sampled else 0.0, stops)])[0]
    if completion.finish_reason == "error":
        raise DraftlineError(f"Held-out prompt {row.sample_id}, arm {arm.name}: {completion.error}")
    return completion


def _request(row: TokenRow, i: int, config: BenchmarkConfig, temperature: float, stops: tuple[int, ...]) -> Request:
    prompt = [int(t) for t in row.input_ids[: row.prompt_length]]
    return Request(
        prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        seed=config.seed + i,
        stop_ids=stops,
    )


def rate(c: Completion) -> float:
    """Decode tokens/s of one answer; its first token, prefill's, doesn't count."""
    return c.metrics.decoded / max(c.metrics.decode_seconds, 1e-9)
