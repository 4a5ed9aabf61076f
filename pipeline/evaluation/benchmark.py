"""Arms of a comparison, decoded by one engine in one process, interleaved prompt by prompt.

Plain decoding is the `none` arm of the same engine. The order of arms rotates from prompt to prompt, so that drift of
the machine's speed falls on all alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config import BenchmarkConfig, EngineConfig
from pipeline.corpus.rows import TokenRow
from pipeline.decoding import Completion, Engine, Request, RoundTrace, StepCost, make_proposer
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import DraftlineError
from pipeline.evaluation.metrics import positions, speedup, summed, totals


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to decode: proposer, scheduler (None length: whole block), rule, sampled or greedy."""

    name: str
    proposer: str
    scheduler: str = "global"
    rule: str = "coupled"
    sampled: bool = False
    baseline: str = "none"


ARMS = (
    Arm("none", "none"),
    Arm("ngram", "ngram"),
    Arm("dspark", "dspark"),
    Arm("dspark fixed", "dspark", "fixed"),
    Arm("none t1", "none", sampled=True, baseline="none t1"),
    Arm("dspark t1", "dspark", sampled=True, baseline="none t1"),
    Arm("dspark t1 ratio", "dspark", "early_stop", "ratio", sampled=True, baseline="none t1"),
)


def pick_prompts(rows: Sequence[TokenRow], calibrate: int, evaluate: int, seed: int) -> tuple[list[TokenRow], ...]:
    """Disjoint (calibration, evaluation) rows, spread over sources, a function of rows and seed.

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
    evaluation = spread[: min(evaluate, max(1, len(spread) - 1))]
    return spread[len(evaluation) : len(evaluation) + calibrate], evaluation


def dspark(draft: DSparkDraft, engine: EngineConfig, rule: str = "coupled") -> Any:
    """The draft as a proposer with a slot for every request of the engine."""
    return make_proposer(
        "dspark", draft, rule=rule, slots=engine.max_requests, capacity=engine.max_context, pack=engine.prepack
    )


def proposers(draft: DSparkDraft, engine: EngineConfig) -> dict[tuple[str, str], Any]:
    """Every proposer the arms need, by (name, rule)."""
    made: dict[tuple[str, str], Any] = {}
    for key in dict.fromkeys(map(_key, ARMS)):
        name, rule = key
        if name == "dspark":
            made[key] = dspark(draft, engine, rule)
        elif name == "ngram":
            made[key] = make_proposer("ngram", block_size=draft.config.block_size)
        else:
            made[key] = make_proposer("none")
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
            whole = (trace.lengths == trace.raw_confidence.shape[1]).numpy()
            raw.append(trace.raw_confidence.numpy()[whole])
            accepted.append(trace.accepted.numpy()[whole])

    engine.on_round = keep
    try:
        requests = [
            _request(r, i, config, temperature=t) for t in (0.0, config.temperature) for i, r in enumerate(rows)
        ]
        engine.generate(requests)
    finally:
        engine.on_round = None
    block = proposer.block_size
    if not raw:
        return np.zeros((0, block)), np.zeros(0, dtype=np.int64)
    return np.concatenate(raw), np.concatenate(accepted)


def run_arms(
    engine: Engine, draft: DSparkDraft, rows: Sequence[TokenRow], config: BenchmarkConfig
) -> dict[str, list[Completion]]:
    """Decodes every prompt with every arm, one request at a time.

    Raises DraftlineError when a request ends with an error, or no prompt is decoded past its first token.
    """
    made = proposers(draft, engine.config)
    done: dict[str, list[Completion]] = {a.name: [] for a in ARMS}
    # The engine learns what drafting costs as it runs: each proposer has its own table, or n-gram's near-zero cost
    # would mix into the neural draft's and the schedule would be neither's.
    costs: dict[tuple[str, str], StepCost] = {}
    warm = dataclasses.replace(config, max_new_tokens=min(8, config.max_new_tokens))
    shared = engine.step_cost or engine.profile()
    for _ in range(2):  # The first pass pays for what is made on first use; the second learns from the rest.
        costs = {key: dataclasses.replace(shared, draft=0.0) for key in made}
        for arm in ARMS:
            engine.step_cost = costs[_key(arm)]
            _decode(engine, arm, made, rows[0], 0, warm)
    # Copied: a table keeps what it answered before it had learned.
    costs = {key: dataclasses.replace(cost) for key, cost in costs.items()}
    began = time.monotonic()
    for i, row in enumerate(rows):
        turn = i % len(ARMS)
        for arm in (*ARMS[turn:], *ARMS[:turn]):
            engine.step_cost = costs[_key(arm)]
            done[arm.name].append(_decode(engine, arm, made, row, i, config))
        left = (time.monotonic() - began) / (i + 1) * (len(rows) - i - 1)
        rates = [_rate(done[a][i]) for a in ("none", "dspark")]
        print(
            f"evaluate: prompt {i + 1}/{len(rows)}, plain {rates[0]:.1f} tokens/s, dspark {rates[1]:.1f} "
            f"(tau {done['dspark'][i].metrics.tau:.2f}), {left:.0f} s left",
            flush=True,
        )
    engine.step_cost = dataclasses.replace(shared, draft=costs["dspark", "coupled"].draft)
    if not any(c.metrics.decoded for c in done["none"]):
        raise DraftlineError(
            f"None of {len(rows)} held-out prompts was decoded past its first token, so there is no speed to compare: "
            f"raise benchmark.max_new_tokens (now {config.max_new_tokens}) or take other prompts."
        )
    return done


def summarise(done: dict[str, list[Completion]], rows: Sequence[TokenRow], config: BenchmarkConfig) -> dict[str, Any]:
    """Per arm: tau, acceptance, tokens/s, speedup with interval, positions, lengths, agreement with its baseline."""
    out: dict[str, Any] = {}
    for arm in ARMS:
        mine, base = done[arm.name], done[arm.baseline]
        metrics = [c.metrics for c in mine]
        steps, decoded = sum(m.target_steps for m in metrics), sum(m.decoded for m in metrics)
        verified, accepted = sum(m.verified for m in metrics), sum(m.accepted for m in metrics)
        usable = [i for i, (a, b) in enumerate(zip(mine, base, strict=True)) if a.metrics.decoded and b.metrics.decoded]
        rates = [_rate(mine[i]) for i in usable]
        base_rates = [_rate(base[i]) for i in usable]
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
            "accept_rate": accepted / verified if verified else 0.0,
            "tokens_per_second": decoded / sum(m.decode_seconds for m in metrics),
            "draft_share": sum(m.draft_seconds for m in metrics) / sum(m.decode_seconds for m in metrics),
            **speedup(rates, base_rates, config.bootstrap, config.seed),
            **totals(tokens[0], seconds[0], tokens[1], seconds[1], config.bootstrap, config.seed),
            "same_text": sum(a.token_ids == b.token_ids for a, b in zip(mine, base, strict=True)),
            "prompts": len(mine),
            "positions": positions(summed([m.offered for m in metrics]), summed([m.accepted_at for m in metrics])),
            "lengths": dict(sorted(Counter(n for m in metrics for n in m.lengths).items())),
            "per_prompt": [
                {
                    "sample_id": rows[i].sample_id,
                    "source": rows[i].source,
                    "tokens_per_second": _rate(mine[i]),
                    "speedup": _rate(mine[i]) / _rate(base[i]),
                    "tau": mine[i].metrics.tau,
                    "tokens": len(mine[i].token_ids),
                }
                for i in usable
            ],
        }
    return out


def _decode(
    engine: Engine, arm: Arm, made: dict[tuple[str, str], Any], row: TokenRow, i: int, config: BenchmarkConfig
) -> Completion:
    engine.set_proposer(made[_key(arm)])
    engine.set_schedule(arm.scheduler, rule=arm.rule)
    completion = engine.generate([_request(row, i, config, temperature=config.temperature if arm.sampled else 0.0)])[0]
    if completion.finish_reason == "error":
        raise DraftlineError(f"Held-out prompt {row.sample_id}, arm {arm.name}: {completion.error}")
    return completion


def _key(arm: Arm) -> tuple[str, str]:
    return arm.proposer, arm.rule if arm.proposer == "dspark" else ""


def _request(row: TokenRow, i: int, config: BenchmarkConfig, temperature: float) -> Request:
    prompt = [int(t) for t in row.input_ids[: row.prompt_length]]
    return Request(prompt, max_new_tokens=config.max_new_tokens, temperature=temperature, seed=config.seed + i)


def _rate(c: Completion) -> float:
    return c.metrics.decoded / max(c.metrics.decode_seconds, 1e-9)
