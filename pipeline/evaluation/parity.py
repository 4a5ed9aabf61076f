"""The parity gate: what training measures of a draft is what the engine makes of it.

A draft with good training figures that is served with another layer tapped, another slot layout, another prompt or an
un-normalised state has an acceptance near nothing, and no error says so. Here the same prompts go both ways: through
the engine, as requests, and through the training forward, teacher-forced, on features made as extraction makes them.

* prompts: what serving renders is, token for token, what the corpus trained on.
* features: the stored rows are what the target gives today (relative distance per tap, median over positions).
* target: the tokens that training's last hidden states predict are those that the engine emitted.
* logits: the draft's, for the same state (root mean square difference over standard deviation), by position.
* acceptance by position: greedy, as counted by both; sampled, 1 - TV as training has it and what the engine accepted.

Letters: A rounds of a request, G tokens per block, N slots compared, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import artifact
from pipeline.config import EngineConfig, ParityConfig, TargetConfig, deciding, to_plain
from pipeline.corpus.build import read_heldout_prompts, read_rows
from pipeline.corpus.conversations import with_system_prompt
from pipeline.corpus.rows import ChatFormat, TokenRow
from pipeline.decoding import Engine, Request
from pipeline.decoding.proposers import Proposal
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import load_draft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.errors import DraftlineError
from pipeline.evaluation.benchmark import block_proposer, chat_stops, pick_prompts
from pipeline.evaluation.checks import Check, table
from pipeline.evaluation.metrics import rounded
from pipeline.features.forward import feature_rows
from pipeline.features.store import FeatureRow, FeatureStore
from pipeline.target import Target, load_identity, load_target
from pipeline.training.anchors import Blocks
from pipeline.training.step import TrainStep, Weights

FEATURES_APART = 0.1
"""Most relative distance of a stored tap from today's: bf16's noise is 0.01 to 0.03, a neighbouring layer 0.2."""
LOGITS_APART = {torch.float32: 0.05}
LOGITS_APART_LOW = 0.15  # where the target decodes in 16 bits
ENOUGH = 10  # slots of a position that are judged by themselves
SAME_TOKENS = 0.98
TIED_LOW = math.exp(-0.25)  # likely enough, of the likeliest, to be chosen by the rounding of 16 bits


class ParityError(DraftlineError):
    """Training and engine disagree about a draft; the message holds every check with its number."""


@dataclasses.dataclass
class Round:
    """A block of one request: its anchor's position, the tokens proposed int64[G], how many were accepted, and the
    logits they were drawn from float32[G, Vd] (None when decoding was greedy)."""

    anchor: int
    tokens: Tensor
    accepted: int
    logits: Tensor | None


@dataclasses.dataclass
class Decoded:
    """A request as the engine decoded it: its whole text and its rounds."""

    text: list[int]
    prompt_length: int
    rounds: list[Round]


def check_parity(
    draft_dir: Path,
    target: TargetConfig,
    corpus_dir: Path,
    features_dir: Path | None,
    engine: EngineConfig,
    parity: ParityConfig,
    out: Path,
    cache_dir: Path,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Compares training and engine for a draft; returns a parity artifact (parity.json), passed or not.

    Args:
        features_dir: what it was trained on; None where features were streamed (nothing stored to compare).
        begin: called when there is work to do.
    """
    inputs = {
        "draft": artifact.load(draft_dir, "draft", verify=False).digest,
        "corpus": artifact.load(corpus_dir, "corpus", verify=False).digest,
    }
    if features_dir is not None:
        inputs["features"] = artifact.load(features_dir, "features", verify=False).digest
    plain = {"target": to_plain(target), "engine": deciding(engine), "parity": to_plain(parity)}
    identity = load_identity(target, cache_dir).as_dict()
    if (done := artifact.current(out, "parity", config=plain, inputs=inputs, target=identity)) is not None:
        return done
    begin()
    room = engine.max_context - parity.max_new_tokens
    fits = [r for r in read_rows(corpus_dir, "heldout") if r.prompt_length <= room]
    rows = pick_prompts(fits, 0, parity.prompts, parity.seed)[1]
    if not rows:
        raise DraftlineError(
            f"The corpus at {corpus_dir} has no held-out prompt that fits engine.max_context={engine.max_context} with "
            f"{parity.max_new_tokens} tokens of answer (parity.max_new_tokens). Raise corpus.heldout_fraction or the "
            "context."
        )
    loaded = load_target(target, cache_dir)
    checks = [_prompts(loaded, target.system_prompt, corpus_dir, rows)]
    # One request at a time: more would only take memory from the second copy of the target.
    config = dataclasses.replace(engine, rule="ratio", scheduler="fixed", max_requests=1)
    decoder = Engine(loaded, config)
    fresh = load_target(target, cache_dir)  # the engine takes the other one over
    draft = load_draft(draft_dir, fresh)
    greedy = decode(decoder, draft, rows, parity, 0.0)
    sampled = decode(decoder, draft, rows, parity, 1.0)
    del decoder, loaded
    if features_dir is not None:
        checks.append(_stored(fresh, draft, FeatureStore(features_dir), parity))
    found, positions = compare(fresh, draft, greedy, sampled)
    checks += found
    content = rounded({"passed": all(c.passed for c in checks), "checks": [c.as_dict() for c in checks]}, 6)
    content |= {"positions": rounded(positions, 4), "draft_digest": inputs["draft"], "prompts": len(rows)}
    with artifact.create(out, "parity", config=plain, inputs=inputs, target=identity) as staging:
        artifact.write_json(staging.path / "parity.json", content)
        staging.counts["prompts"] = len(rows)
        staging.info["passed"] = content["passed"]
    print(table(checks), flush=True)
    return artifact.load(out, "parity", verify=False)


def require_parity(parity_dir: Path, draft_digest: str) -> None:
    """Raises ParityError unless the artifact says that this draft passed; ArtifactError when there is none."""
    artifact.load(parity_dir, "parity")
    content = json.loads((parity_dir / "parity.json").read_text())
    if content["draft_digest"] != draft_digest:
        raise ParityError(
            f"The parity check at {parity_dir} was of the draft {content['draft_digest'][:12]}, not of "
            f"{draft_digest[:12]}. Run the parity stage for this one."
        )
    if not content["passed"]:
        checks = [Check(**c) for c in content["checks"]]
        raise ParityError(
            "Training and engine disagree about this draft, so its figures are not what it would do when served:\n"
            f"{table(checks)}\nMend what the failed checks name and train again; it can't be registered."
        )


def decode(
    engine: Engine, draft: Draft, rows: Sequence[TokenRow], parity: ParityConfig, temperature: float
) -> list[Decoded]:
    """Decodes prompts with whole blocks verified, and keeps every round."""
    proposer = block_proposer(draft, engine.config, "ratio")
    kept: list[tuple[list[int], Proposal]] = []
    propose = proposer.propose

    def watched(sequences: list[Any]) -> Proposal:
        proposal = propose(sequences)
        # Copies: the next block may be written over this one.
        logits = None if proposal.logits is None else proposal.logits.clone()
        copied = dataclasses.replace(proposal, tokens=proposal.tokens.clone(), logits=logits)
        kept.append(([len(s.tokens) - 1 for s in sequences], copied))
        return proposal

    proposer.propose = watched
    engine.set_proposer(proposer)
    engine.set_schedule("fixed", rule="ratio")
    done, stops = [], chat_stops(engine)
    for i, row in enumerate(rows):
        prompt = [int(t) for t in row.input_ids[: row.prompt_length]]
        kept.clear()
        accepted: list[int] = []
        engine.on_round = lambda trace, accepted=accepted: accepted.append(int(trace.accepted[0]))  # type: ignore[misc]
        try:
            request = Request(
                prompt, parity.max_new_tokens, temperature=temperature, seed=parity.seed + i, stop_ids=stops
            )
            completion = engine.generate([request])[0]
        finally:
            engine.on_round = None
        if completion.finish_reason == "error":
            raise DraftlineError(f"Held-out prompt {row.sample_id}: {completion.error}")
        rounds = [
            Round(at[0], p.tokens[0].cpu(), n, None if p.logits is None else p.logits[0].float().cpu())
            for (at, p), n in zip(kept, accepted, strict=True)
        ]
        done.append(Decoded(prompt + completion.token_ids, len(prompt), rounds))
    return done


def compare(
    target: Target, draft: Draft, greedy: list[Decoded], sampled: list[Decoded]
) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks of target, logits and acceptance, and acceptance by position: both ways, greedy and sampled."""
    step = TrainStep(draft, target.lm_head_weight, Weights(), num_anchors=1, seed=0)
    block, d2t = draft.config.tokens_per_block, draft.d2t.cpu()
    counts = np.zeros((2, 3, block))  # greedy, sampled x (slots, training's acceptance, the engine's)
    variance = np.zeros(block)
    hits = tries = 0
    tied = 1.0 if target.dtype == torch.float32 else TIED_LOW
    apart: list[list[float]] = [[] for _ in range(block)]
    with torch.no_grad():
        for kind, texts in enumerate((greedy, sampled)):
            for text, row in zip(texts, _features(target, draft, texts), strict=True):
                rounds = [r for r in text.rounds if 0 < r.anchor < len(text.text) - 1]
                if not rounds:
                    continue
                mine = _training_logits(step, row, rounds)
                p = _target_probabilities(step, row.last_hidden)
                if not kind:
                    said = torch.tensor(text.text[text.prompt_length :])
                    mass = p[text.prompt_length - 1 : len(text.text) - 1]
                    predicted = mass.gather(1, said[:, None].to(mass.device))[:, 0] >= tied * mass.amax(-1)
                    hits, tries = hits + int(predicted.sum()), tries + len(said)
                for i, r in enumerate(rounds):
                    # Slots after a rejection go on from a token that the text doesn't have.
                    reached = min(r.accepted + 1, block, len(text.text) - 1 - r.anchor)
                    if r.logits is not None:
                        # A block drafter's have the proposal's tokens before them, whatever became of those.
                        for k in range(reached if isinstance(draft, Eagle3Draft) else block):
                            apart[k].append(_distance(mine[i, k], r.logits[k]))
                    for k in range(reached):
                        ours = mine[i, k]
                        if r.logits is not None:
                            q = ours.softmax(-1)
                            expected = float(torch.minimum(q, p[r.anchor + k][d2t]).sum())
                            variance[k] += expected * (1 - expected)
                        else:
                            token = int(d2t[ours.argmax()])
                            expected = float(token == text.text[r.anchor + 1 + k])
                        counts[kind, :, k] += 1, expected, r.accepted > k
    checks = [_share("target tokens", hits, tries, "tokens that training's last hidden states predict were emitted")]
    checks.append(_logits(apart, LOGITS_APART.get(target.dtype, LOGITS_APART_LOW)))
    return checks + _acceptance(counts, variance), _positions(counts)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Of logits [Vd], each without its mean: root mean square difference in standard deviations of ours."""
    difference = (ours - ours.mean()) - (theirs - theirs.mean())
    return float(difference.square().mean().sqrt() / ours.std())


def _logits(apart: list[list[float]], bound: float) -> Check:
    """The furthest position's distance; positions with few slots are judged with those before them."""
    groups: list[tuple[int, list[float]]] = []
    for k, slots in enumerate(apart, start=1):
        if groups and len(slots) < ENOUGH:
            groups[-1][1].extend(slots)
        else:
            groups.append((k, list(slots)))
    found = [(float(np.quantile(slots, 0.9)) if slots else float("nan"), k, len(slots)) for k, slots in groups]
    # One that is no number is the furthest of all.
    worst, k, count = max(found, key=lambda f: (math.isnan(f[0]), f[0]))
    detail = f"9 in 10 of {count} slots at position {k}, the furthest, are no further"
    return Check("draft logits", worst, f"<= {bound:g}", worst <= bound, detail)


def _acceptance(counts: np.ndarray, variance: np.ndarray) -> list[Check]:
    """Per position that 20 or more slots reached: training's acceptance against the engine's, within its error."""
    checks = []
    for kind, name in enumerate(("greedy", "sampled")):
        for k in range(counts.shape[2]):
            n, training, engine = counts[kind, :, k]
            if n < 20 and k:
                continue
            difference = float(abs(training - engine) / max(n, 1))
            if kind:
                error = 3 * float(np.sqrt(variance[k])) / max(n, 1) + 1 / max(n, 1)
            else:  # the same slots, counted twice: only near-ties may differ
                error = 1 - SAME_TOKENS + 1 / max(n, 1)
            checks.append(
                Check(f"{name} acceptance {k + 1}", difference, f"<= {error:.3f}", bool(n and difference <= error),
                      f"training {training / max(n, 1):.3f}, engine {engine / max(n, 1):.3f}, {int(n)} slots")
            )  # fmt: skip
    return checks


def _positions(counts: np.ndarray) -> list[dict[str, Any]]:
    out = []
    for k in range(counts.shape[2]):
        entry: dict[str, Any] = {"position": k + 1}
        for kind, name in enumerate(("greedy", "sampled")):
            n, training, engine = counts[kind, :, k]
            entry[name] = {
                "slots": int(n),
                "training": float(training / max(n, 1)),
                "engine": float(engine / max(n, 1)),
            }
        out.append(entry)
    return out


def _prompts(target: Target, system_prompt: str | None, corpus_dir: Path, rows: Sequence[TokenRow]) -> Check:
    """Whether serving renders the held-out conversations to the tokens that the corpus holds."""
    conversations = read_heldout_prompts(corpus_dir)
    chat = ChatFormat(target.tokenizer)
    same = 0
    for row in rows:
        served = chat.prompt_ids(with_system_prompt(conversations[row.sample_id], system_prompt))
        same += served == [int(t) for t in row.input_ids[: row.prompt_length]]
    return Check(
        "prompts", same, f"= {len(rows)}", same == len(rows), "rendered as serving does, they are the corpus' tokens"
    )


def _stored(target: Target, draft: Draft, store: FeatureStore, parity: ParityConfig) -> Check:
    """How far stored features are from what the target gives: the worst of the taps and the last hidden state."""
    chosen = np.random.default_rng(parity.seed).permutation(len(store))[: min(parity.prompts, 4)]
    ids = draft.config.target_layer_ids
    worst, where = 0.0, ""
    for i in sorted(int(i) for i in chosen):
        theirs = store[i]
        (mine,) = feature_rows(target, [_token_row(theirs.input_ids.tolist(), 1)], ids, 1)
        if mine is None or mine.taps.shape != theirs.taps.shape:
            return Check("features", float("inf"), f"<= {FEATURES_APART:g}", False, f"other taps: {theirs.sample_id}")
        parts = [*mine.taps.float().chunk(len(ids), -1), mine.last_hidden.float()]
        others = [*theirs.taps.float().chunk(len(ids), -1), theirs.last_hidden.float()]
        for name, a, b in zip([*(f"layer {n}" for n in ids), "last hidden"], parts, others, strict=True):
            distance = float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-6)).median())
            if not distance <= worst:
                worst, where = distance, name
    detail = f"stored rows from what the target gives now; the furthest is {where}"
    return Check("features", worst, f"<= {FEATURES_APART:g}", worst <= FEATURES_APART, detail)


def _features(target: Target, draft: Draft, texts: list[Decoded]) -> list[FeatureRow]:
    """The texts' features as extraction makes them."""
    rows = [_token_row(t.text, t.prompt_length) for t in texts]
    made = feature_rows(target, rows, draft.config.target_layer_ids, 1024)
    if any(r is None for r in made):
        raise ParityError("The target's features of a decoded text are not finite. Check its weights and dtype.")
    return [r for r in made if r is not None]


def _token_row(text: list[int], prompt_length: int) -> TokenRow:
    mask = np.zeros(len(text), dtype=bool)
    mask[prompt_length:] = True
    return TokenRow("0" * 32, np.asarray(text, dtype=np.int32), mask, "parity", prompt_length)


def _training_logits(step: TrainStep, row: FeatureRow, rounds: list[Round]) -> Tensor:
    """float32[A, G, Vd]: the training forward's logits of the rounds' blocks, teacher-forced by the text (the Markov
    head: by what was proposed)."""
    draft, block = step.draft, step.draft.config.tokens_per_block
    anchors = torch.tensor([r.anchor for r in rounds], device=draft.d2t.device)
    blocks = Blocks(anchors, torch.ones(len(rounds), block, dtype=torch.bool))
    hidden = step.hidden([(row, blocks)]).float()
    logits = draft.logits(hidden.to(draft.lm_rows.dtype)).float()
    if draft.markov_head is not None:
        first = row.input_ids.to(anchors.device)[anchors].long()
        proposed = torch.stack([r.tokens for r in rounds]).to(first)
        previous = torch.cat((first[:, None], proposed[:, :-1]), 1)
        codes = draft.markov_head.codes(hidden.unflatten(0, (-1, block)), previous)
        logits = logits + draft.markov_head.markov_w2(codes.flatten(0, 1))
    return logits.unflatten(0, (-1, block)).cpu()


def _target_probabilities(step: TrainStep, last_hidden: Tensor) -> Tensor:
    """float32[S, V] of the target after every position, from its last hidden states as stored."""
    logits = (last_hidden.to(step.lm_head.device, step.lm_head.dtype) @ step.lm_head.T).float()
    return step.draft.cap(logits).softmax(-1).cpu()


def _share(name: str, hits: int, tries: int, detail: str) -> Check:
    share = hits / max(tries, 1)
    return Check(name, share, f">= {SAME_TOKENS:g}", share >= SAME_TOKENS, f"{hits} of {tries} {detail}")
