"""The stages of evaluation: calibrate a draft, measure it, and measure it beside another.

`begin` is called once a stage finds that what it would make isn't there already.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import artifact
from pipeline.config import BenchmarkConfig, EngineConfig, TargetConfig, deciding, to_plain
from pipeline.corpus.build import read_rows
from pipeline.decoding import Engine
from pipeline.decoding.step_cost import device_name
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import load_draft, save_draft
from pipeline.errors import DraftlineError
from pipeline.evaluation.benchmark import (
    COUPLED,
    Arm,
    block_proposer,
    collect_rounds,
    pick_prompts,
    proposers,
    report_arms,
    run_arms,
    summarise,
)
from pipeline.evaluation.calibration import Calibration, fit
from pipeline.evaluation.metrics import CONVENTIONS, rounded
from pipeline.evaluation.report import render
from pipeline.target import load_identity, load_target

LEAST_PROMPTS = 3
"""Temperatures fitted on the rounds of fewer texts would be theirs, not the draft's."""


def calibrate_draft(
    draft_dir: Path,
    target: TargetConfig,
    corpus_dir: Path,
    engine: EngineConfig,
    benchmark: BenchmarkConfig,
    out: Path,
    cache_dir: Path,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Fits the confidences' temperatures on held-out rounds; returns a draft artifact that holds them.

    Raises:
        DraftlineError: fewer than `LEAST_PROMPTS` held-out prompts for it.
    """
    inputs = _inputs(draft_dir, corpus_dir)
    plain = _settings(target, engine, benchmark)
    for name in ("prompts", "bootstrap"):  # of what is timed: more of it is no other calibration, and no other draft
        del plain["benchmark"][name]
    identity = load_identity(target, cache_dir).as_dict()
    if (done := artifact.current(out, "draft", config=plain, inputs=inputs, target=identity)) is not None:
        return done
    begin()
    running, (draft,), (calibration, _) = _prepare([draft_dir], target, corpus_dir, engine, benchmark, cache_dir)
    if len(calibration) < LEAST_PROMPTS:
        raise DraftlineError(
            f"Calibration needs {LEAST_PROMPTS} held-out prompts or more and has {len(calibration)} "
            f"(benchmark.calibrate_prompts={benchmark.calibrate_prompts}; one other at least is timed). Raise "
            "benchmark.calibrate_prompts where it asks for fewer, else corpus.heldout_fraction; or give more "
            "conversations."
        )
    _say_fewer("calibrate", len(calibration), "calibrate_prompts", benchmark.calibrate_prompts, "1 is left to be timed")
    print(f"calibrate: {len(calibration)} prompts, whole blocks verified", flush=True)
    fitted = fit(*collect_rounds(running, block_proposer(draft, engine, engine.rule), calibration, benchmark))
    draft.temperatures.copy_(torch.tensor(fitted.temperatures))
    for p in fitted.positions:
        note = " (too few rounds: kept)" if p["too_few"] else ""
        print(
            f"calibrate: position {p['position']} T {p['temperature']:.2f} ECE {p['ece_before']:.3f} -> "
            f"{p['ece_after']:.3f} over {p['rounds']} rounds{note}",
            flush=True,
        )
    was = artifact.load(draft_dir, "draft", verify=False)
    return save_draft(
        out,
        draft,
        target=was.target or {},
        config=plain,
        inputs=inputs,
        info={**was.info, "calibration": rounded(fitted.as_dict())},
    )


def evaluate_draft(
    draft_dir: Path,
    target: TargetConfig,
    corpus_dir: Path,
    engine: EngineConfig,
    benchmark: BenchmarkConfig,
    out: Path,
    cache_dir: Path,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Measures a draft on held-out prompts; returns a report artifact (report.json, report.html)."""
    inputs, asked = _inputs(draft_dir, corpus_dir), report_arms(engine)
    plain = _settings(target, engine, benchmark)
    made_by = _measuring(plain, asked)
    identity = load_identity(target, cache_dir).as_dict()
    if (done := artifact.current(out, "report", config=made_by, inputs=inputs, target=identity)) is not None:
        return done
    begin()
    running, (draft,), (others, evaluation) = _prepare([draft_dir], target, corpus_dir, engine, benchmark, cache_dir)
    _say_fewer("evaluate", len(evaluation), "prompts", benchmark.prompts, f"{len(others)} others are calibration's own")
    made = proposers(asked, {"draft": draft}, engine)
    done_by_arm, costs = run_arms(running, asked, made, evaluation, benchmark, ("none", "draft"))
    arms = summarise(done_by_arm, evaluation, benchmark, asked)
    cost = costs["draft", engine.rule]
    measured = _measure_calibration(running, draft, evaluation, engine, benchmark)
    manifest = artifact.load(draft_dir, "draft", verify=False)
    greedy = [a for a in arms.values() if a["temperature"] == 0]
    main, sampled = arms["draft"], arms["draft t1"]
    seeded = arms.get(COUPLED, sampled)  # under the ratio rule a seed's text depends on the draft by design
    content: dict[str, Any] = {
        "exact_greedy": all(a["same_text"] == a["prompts"] for a in greedy),
        "exact_sampled": seeded["same_text"] == seeded["prompts"],
        "headline": {
            "speedup": main["speedup"],
            "speedup_low": main["low"],
            "speedup_high": main["high"],
            "tau": main["tau"],
            "accept_rate": main["accept_rate"],
            "verified_accept_rate": main["verified_accept_rate"],
            "prompts": main["timed"],
            "speedup_totals": main["totals"],
            # By the rule that serves; the better of two noisy measurements would flatter.
            "speedup_t1": sampled["speedup"],
            "speedup_t1_low": sampled["low"],
            "speedup_t1_high": sampled["high"],
            "tau_t1": sampled["tau"],
            "speedup_t1_ratio": arms["draft t1 ratio"]["speedup"],
            "speedup_fixed": arms["draft fixed"]["speedup"],
            "tau_fixed": arms["draft fixed"]["tau"],
            "ngram_speedup": arms["ngram"]["speedup"],
            "tokens_per_second": main["tokens_per_second"],
            "baseline_tokens_per_second": arms["none"]["tokens_per_second"],
        },
        "arms": arms,
        "calibration": measured.as_dict(),
        "step_cost": dataclasses.asdict(cost),
        "target": manifest.target,
        "draft_digest": manifest.digest,
        "corpus_digest": inputs["corpus"],
        "evaluation_set_digest": artifact.digest_json(sorted(r.sample_id for r in evaluation)),
        "calibration_rounds": manifest.info.get("calibration", {}).get("rounds", 0),
        "conventions": CONVENTIONS,
        "provenance": {
            "code_version": artifact.code_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device_name()}",
            "torch": torch.__version__,
            "settings": plain,
        },
    }
    content = rounded(content, 6)
    with artifact.create(out, "report", config=made_by, inputs=inputs, target=manifest.target) as staging:
        artifact.write_json(staging.path / "report.json", content)
        (staging.path / "report.html").write_text(render(content))
        staging.counts["prompts"] = len(evaluation)
        staging.info["headline"] = content["headline"]
    return artifact.load(out, "report", verify=False)


def compare_drafts(
    challenger_dir: Path,
    champion_dir: Path,
    target: TargetConfig,
    corpus_dir: Path,
    engine: EngineConfig,
    benchmark: BenchmarkConfig,
    out: Path,
    cache_dir: Path,
    begin: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measures two drafts of one target side by side on held-out prompts: greedy, by the engine's own scheduler and
    rule, interleaved by prompt.

    A champion that was trained on other splits of the corpus may have seen some of these prompts; that favours it.

    Returns:
        comparison.json, which is also kept as an artifact at `out`: `ratio` of the challenger's tokens/s over the
        champion's, all prompts together, with its paired 95 % interval (`low`, `high`), `prompts`, and for
        `challenger` and `champion` draft_digest, tau, accept_rate, verified_accept_rate and tokens_per_second.
    """
    dirs = {"challenger": challenger_dir, "champion": champion_dir}
    inputs = {name: artifact.load(path, "draft", verify=False).digest for name, path in dirs.items()}
    inputs |= {"corpus": artifact.load(corpus_dir, "corpus", verify=False).digest}
    arms = tuple(Arm(name, name, engine.scheduler, engine.rule, baseline="champion") for name in dirs)
    made_by = _measuring(_settings(target, engine, benchmark), arms)
    identity = load_identity(target, cache_dir).as_dict()
    file = out / "comparison.json"
    if artifact.current(out, "comparison", config=made_by, inputs=inputs, target=identity) is not None:
        return json.loads(file.read_text())
    begin()
    running, drafts, (_, rows) = _prepare(list(dirs.values()), target, corpus_dir, engine, benchmark, cache_dir)
    made = proposers(arms, dict(zip(dirs, drafts, strict=True)), engine)
    done, _ = run_arms(running, arms, made, rows, benchmark, ("champion", "challenger"))
    numbers = summarise(done, rows, benchmark, arms)
    mine, rates = numbers["challenger"], ("tau", "accept_rate", "verified_accept_rate")
    content: dict[str, Any] = {
        "ratio": mine["totals"],
        "low": mine["totals_low"],
        "high": mine["totals_high"],
        "prompts": mine["prompts"],
        **{
            name: {
                "draft_digest": inputs[name],
                **{k: numbers[name][k] for k in (*rates, "tokens_per_second")},
            }
            for name in dirs
        },
        "conventions": {k: CONVENTIONS[k] for k in (*rates, "totals", "interval")},
    }
    content = rounded(content, 6)
    with artifact.create(out, "comparison", config=made_by, inputs=inputs, target=identity) as staging:
        artifact.write_json(staging.path / "comparison.json", content)
        staging.counts["prompts"] = len(rows)
    return content


def _prepare(
    draft_dirs: Sequence[Path],
    target: TargetConfig,
    corpus_dir: Path,
    engine: EngineConfig,
    benchmark: BenchmarkConfig,
    cache_dir: Path,
) -> tuple[Engine, list[Draft], tuple[list[Any], ...]]:
    loaded = load_target(target, cache_dir)
    drafts = [load_draft(path, loaded) for path in draft_dirs]
    rows = read_rows(corpus_dir, "heldout")
    room = engine.max_context - benchmark.max_new_tokens
    fits = [r for r in rows if r.prompt_length <= room]
    if len(fits) < len(rows):
        print(
            f"{len(rows) - len(fits)} of {len(rows)} held-out prompts are longer than engine.max_context="
            f"{engine.max_context} leaves room for; they are left out",
            flush=True,
        )
    rows = fits
    if len(rows) < 2:
        raise DraftlineError(
            f"The corpus at {corpus_dir} has {len(rows)} held-out rows to decode; evaluation needs 2 or "
            "more. Raise corpus.heldout_fraction or engine.max_context, or give more conversations."
        )
    picked = pick_prompts(rows, benchmark.calibrate_prompts, benchmark.prompts, benchmark.seed)
    # Arms decode the same prompts in turn: none is to find what another computed.
    return Engine(loaded, dataclasses.replace(engine, prefix_cache=False)), drafts, picked


def _say_fewer(stage: str, have: int, setting: str, asked: int, rest: str) -> None:
    if have < asked:
        print(
            f"{stage}: {have} held-out prompts, not the {asked} of benchmark.{setting}: the corpus holds out no more "
            f"(corpus.heldout_fraction), and {rest}",
            flush=True,
        )


def _measure_calibration(
    running: Engine, draft: Draft, rows: list[Any], engine: EngineConfig, benchmark: BenchmarkConfig
) -> Calibration:
    raw, accepted = collect_rounds(running, block_proposer(draft, engine, engine.rule), rows, benchmark)
    return fit(raw, accepted, np.asarray(draft.temperatures.tolist()))


def _inputs(draft_dir: Path, corpus_dir: Path) -> dict[str, str]:
    return {
        "draft": artifact.load(draft_dir, "draft", verify=False).digest,
        "corpus": artifact.load(corpus_dir, "corpus", verify=False).digest,
    }


def _measuring(plain: dict[str, Any], arms: Sequence[Arm]) -> dict[str, Any]:
    """What measured figures depend on beside their inputs: where an arm or a definition changed, they are another's."""
    return {**plain, "arms": [dataclasses.asdict(a) for a in arms], "conventions": CONVENTIONS}


def _settings(target: TargetConfig, engine: EngineConfig, benchmark: BenchmarkConfig) -> dict[str, Any]:
    # Which target it is follows from the draft's digest; what it decodes in does not.
    decoding = {"dtype": target.dtype, "device": target.device}
    return {"target": decoding, "engine": deciding(engine), "benchmark": to_plain(benchmark)}
