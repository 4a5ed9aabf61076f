"""Sampled text of the whole engine follows the target's distribution, which is small enough to write down.

The tiny target is left with five tokens to say, so that all three-token continuations can be enumerated with its own
logits in float64. The draft is a real DSpark draft over those tokens: random, so that acceptance and rejection both
happen at every position.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2, ncx2

from draftline_kernels import transform
from draftline_kernels.verify import _accept_equal as _right
from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request, RequestMetrics, StepCost, make_proposer
from pipeline.decoding.proposers.base import Proposal
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import make_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.target import Target, load_target
from tests.decoding.samples import KnownCost
from tests.statistical.chi_square import p_value

TOKENS = (40, 41, 57, 60, 66)
PROMPT = [40, 57, 41, 66, 40, 57]
LENGTH = 3
REQUESTS = 4_000
LEARNED = 6_000  # where what became of earlier requests must show first
PAIRED = 1_600  # of each pairing, of which there are many
ASKS = {"plain": (1.0, 0, 1.0), "sharp, top-p": (0.8, 0, 0.9), "top-k": (1.0, 3, 1.0)}


@pytest.fixture
def target(cache_dir: Path) -> Target:
    """The tiny target with all but TOKENS silenced by a bias of its lm_head, and livelier logits."""
    made = load_target(TargetConfig(path="tiny"), cache_dir)
    head = made.model.get_output_embeddings()
    bias = torch.full((head.weight.shape[0],), -1e9)
    bias[list(TOKENS)] = 0.0
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made


KINDS: dict[str, dict[str, Any]] = {
    "dspark": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"algorithm": "dflash", "markov_head_type": "none", "enable_confidence_head": False},
    "dflash behind the anchor": {
        "algorithm": "dflash",
        "markov_head_type": "none",
        "enable_confidence_head": False,
        "sample_from_anchor": False,
        "block_size": 4,
    },
    "eagle3": {"algorithm": "eagle3", "num_layers": 1, "markov_head_type": "none", "enable_confidence_head": False},
}


def make(target: Target, kind: str, **changes: Any) -> Draft:
    """A random draft over TOKENS, three tokens a block; of "ngram" and "none", any."""
    settings = {"block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 2], **KINDS.get(kind, {}), **changes}
    config = resolve(DraftConfig(**settings), target.config, target.unused_token)
    torch.manual_seed(5)
    made = make_draft(config, target, torch.tensor(TOKENS))
    if isinstance(made, DSparkDraft) and made.markov_head is not None:
        torch.nn.init.normal_(made.markov_head.markov_w1.weight)
        torch.nn.init.normal_(made.markov_head.markov_w2.weight, std=0.3)
    return made


@pytest.fixture
def draft(target: Target) -> Draft:
    return make(target, "dspark")


def exact(target: Target, ask: tuple[float, int, float], length: int = LENGTH) -> torch.Tensor:
    """float64[5 ** length]: probability of each continuation, by transformers' own forward of every one of them."""
    texts = list(itertools.product(TOKENS, repeat=length))
    with torch.inference_mode():
        logits = target.model(torch.tensor([PROMPT + list(t) for t in texts])).logits[:, len(PROMPT) - 1 : -1]
    n = torch.ones(len(texts) * length)
    flat = transform(logits.flatten(0, 1), n * ask[0], (n * ask[1]).long(), n * ask[2])
    p = flat.double().softmax(-1).view(len(texts), length, -1)
    return p.gather(-1, torch.tensor(texts)[..., None]).squeeze(-1).prod(-1)


def engine_config(rule: str, scheduler: str, *, queue: int, context: int) -> EngineConfig:
    """Of engines that draw many short texts at once."""
    return EngineConfig(
        max_requests=96,
        max_context=context,
        max_queue=queue,
        threads=1,
        prefill_chunk=1024,
        rule=rule,
        scheduler=scheduler,
        threshold=0.1,
    )


def decode(
    target: Target,
    draft: Draft,
    name: str,
    rule: str,
    scheduler: str,
    ask: tuple[float, int, float],
    *,
    length: int = LENGTH,
    cost: StepCost | None = None,
    metrics: list[RequestMetrics] | None = None,
    first_seed: int = 0,
    draws: int = REQUESTS,
    **more: Any,
) -> tuple[torch.Tensor, float]:
    """Counts int64[5 ** length] of continuations over `draws` seeds, and the share of verified tokens accepted.

    metrics: where those of the requests go.
    """
    cost = cost or KnownCost([1, 64, 512], [0], [[1.0], [1.05], [3.0]])
    config = engine_config(rule, scheduler, queue=draws, context=16)
    engine = Engine(target, config, step_cost=cost)
    options = {"rule": rule} if name not in ("none", "ngram") else {}
    engine.set_proposer(make_proposer(name, draft, **options))
    temperature, top_k, top_p = ask
    done = engine.generate(
        Request(
            PROMPT,
            max_new_tokens=length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=first_seed + i,
            ignore_eos=True,
            **more,
        )
        for i in range(draws)
    )
    place = {t: i for i, t in enumerate(itertools.product(TOKENS, repeat=length))}
    counts = torch.bincount(torch.tensor([place[tuple(d.token_ids)] for d in done]), minlength=len(place))
    if metrics is not None:
        metrics += [d.metrics for d in done]
    verified = sum(d.metrics.verified for d in done)
    return counts, sum(d.metrics.accepted for d in done) / max(verified, 1)


CAUSAL = ("early_stop", "asynchronous", "threshold", "fixed")
VARIANTS = ("gated", "rnn", "dflash behind the anchor")
# Every proposer under every schedule that the ratio rule takes, variants under two; the samplers in turn, so that each
# meets every schedule, and every proposer that has all four. Under the coupled rule the text is the seed's whatever
# proposes and schedules (tests/decoding/test_seeds.py holds it), so that a few stand for all. A bias of 1 %, finer
# than so many draws show, two tests below see (one of all proposers, slow, one in a target that forgets), and
# tests/kernels/test_verify.py of the verifier alone.
PAIRINGS = [
    (kind, "ratio", scheduler, list(ASKS)[(i + j) % len(ASKS)])
    for i, kind in enumerate(("ngram", *KINDS))
    for j, scheduler in enumerate(CAUSAL)
    if kind not in VARIANTS or (i + j) % 2
] + [
    ("none", "coupled", "global", "plain"),
    ("none", "ratio", "fixed", "top-k"),
    ("ngram", "coupled", "global", "top-k"),
    ("dspark", "coupled", "global", "plain"),
    ("dspark", "coupled", "fixed", "sharp, top-p"),
    ("eagle3", "coupled", "global", "plain"),
]


@pytest.mark.parametrize(("kind", "rule", "scheduler", "ask"), PAIRINGS)
def test_continuations_follow_the_target(target: Target, kind: str, rule: str, scheduler: str, ask: str) -> None:
    wanted = exact(target, ASKS[ask])
    assert abs(float(wanted.sum()) - 1) < 1e-6
    name = KINDS.get(kind, {}).get("algorithm", "dspark" if kind in KINDS else kind)
    # Seeds of their own: chance that all had in common would be one test of it.
    first = 100_000 * PAIRINGS.index((kind, rule, scheduler, ask))
    counts, accepted = decode(
        target, make(target, kind), name, rule, scheduler, ASKS[ask], first_seed=first, draws=PAIRED
    )
    assert p_value(counts, wanted) > 1e-4
    if kind in KINDS:
        assert 0.05 < accepted < 0.95, "both outcomes of a verification must occur"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "rule"), [*((kind, "ratio") for kind in ("ngram", *KINDS)), ("dspark", "coupled")])
def test_a_hundredth_of_the_mass_on_another_token_would_be_seen(target: Target, kind: str, rule: str) -> None:
    """Second and third token each by itself (the first is prefill's): five outcomes show more than 125."""
    draws, level = 90_000, 1e-4
    joint = exact(target, ASKS["plain"]).view(5, 5, 5)
    name = KINDS.get(kind, {}).get("algorithm", "dspark" if kind in KINDS else kind)
    scheduler = "early_stop" if rule == "ratio" else "global"
    counts, _ = decode(
        target, make(target, kind), name, rule, scheduler, ASKS["plain"], first_seed=10_000_000, draws=draws
    )
    for others in ((0, 2), (0, 1)):
        wanted = joint.sum(others)
        assert p_value(counts.view(5, 5, 5).sum(others), wanted) > level
        likely, unlikely = wanted.topk(2).values.tolist()
        shift = draws * 0.01**2 * (1 / likely + 1 / unlikely)
        assert float(ncx2.sf(chi2.isf(level, 4), 4, shift)) > 0.95, "the power to see it"


def test_a_hundredth_of_the_mass_on_another_token_would_be_seen_in_a_target_that_forgets(target: Target) -> None:
    """The same in seconds: where the target says each token with its chance whatever came before, and only the draft
    looks back, every verified token of a long text is a draw of its own."""
    chances = torch.tensor([0.22, 0.21, 0.2, 0.19, 0.18], dtype=torch.float64)
    head = target.model.get_output_embeddings()
    del target.family.layers[1:]  # whose work would come to nothing
    target.config.num_hidden_layers = 1
    draft = make(target, "dspark", num_layers=1, target_layer_ids=[0])
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight), requires_grad=False)
    head.bias.data[list(TOKENS)] = chances.log().float()
    texts, length, level = 384, 111, 1e-4
    config = engine_config("ratio", "fixed", queue=texts, context=160)
    engine = Engine(target, config, make_proposer("dspark", draft, rule="ratio"))
    asked = [Request(PROMPT, max_new_tokens=length, temperature=1.0, seed=i, ignore_eos=True) for i in range(texts)]
    done = engine.generate(asked)
    said = torch.tensor([[TOKENS.index(t) for t in d.token_ids[1:]] for d in done])
    assert p_value(torch.bincount(said.flatten(), minlength=5), chances) > level
    pairs = said[:, :-1] * 5 + said[:, 1:]
    halves = (pairs[:, ::2], pairs[:, 1::2])  # pairs that overlap are no draws of their own
    assert all(
        p_value(torch.bincount(h.flatten(), minlength=25), chances.outer(chances).flatten()) > level for h in halves
    )
    accepted, verified = sum(d.metrics.accepted for d in done), sum(d.metrics.verified for d in done)
    assert 0.05 < accepted / verified < 0.95
    likely, unlikely = chances.topk(2).values.tolist()
    shift = said.numel() * 0.01**2 * (1 / likely + 1 / unlikely)
    assert float(ncx2.sf(chi2.isf(level, 4), 4, shift)) > 0.95, "the power to see it"


@pytest.mark.parametrize(("rule", "scheduler"), [("ratio", "asynchronous"), ("coupled", "global")])
def test_skipping_drafts_keeps_the_distribution(target: Target, draft: Draft, rule: str, scheduler: str) -> None:
    """Drafting that hardly pays: whom it is done for depends on what became of the earlier rounds of each text."""
    length, wanted = 4, exact(target, ASKS["plain"], 4)
    metrics: list[RequestMetrics] = []
    cost = KnownCost([1, 512], [0], [[1.0], [2.0]], drafting={1: (0.003, 9), 96: (0.288, 9)})
    counts, _ = decode(
        target,
        draft,
        "dspark",
        rule,
        scheduler,
        ASKS["plain"],
        length=length,
        cost=cost,
        metrics=metrics,
        draws=LEARNED,
    )
    assert p_value(counts, wanted) > 1e-4
    steps, skipped = (sum(x) for x in zip(*((m.target_steps, m.skipped) for m in metrics), strict=True))
    assert 0.2 < skipped / steps < 0.8
    assert sum(m.drafted > 0 and m.skipped > 0 for m in metrics) > 0.2 * len(metrics), "both in one text"


PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.7,
    "logit_bias": {TOKENS[1]: 0.8},
    "min_p": 0.08,
}


def exactly_penalised(target: Target, temperature: float) -> torch.Tensor:
    """float64[5, 5, 5] under PENALTIES: each continuation token by token, as plain decoding would come to it."""
    texts = list(itertools.product(TOKENS, repeat=LENGTH))
    with torch.inference_mode():
        logits = target.model(torch.tensor([PROMPT + list(t) for t in texts])).logits[:, len(PROMPT) - 1 : -1].double()
    out = []
    for text, rows in zip(texts, logits, strict=True):
        chance = 1.0
        for i, token in enumerate(text):
            z = {t: float(rows[i, t]) + PENALTIES["logit_bias"].get(t, 0.0) for t in TOKENS}
            for t in z:
                said = text[:i].count(t)
                if said or t in PROMPT:
                    z[t] = z[t] / 1.4 if z[t] > 0 else z[t] * 1.4
                z[t] -= 0.7 * said + 0.5 * (said > 0)
            weight = {t: math.exp(v / temperature) for t, v in z.items()}
            kept = {t: w if w >= 0.08 * max(weight.values()) else 0.0 for t, w in weight.items()}
            chance *= kept[token] / sum(kept.values())
        out.append(chance)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("rule", "scheduler"), [("ratio", "early_stop"), ("coupled", "global")])
def test_penalties_hold_at_every_position_of_a_block(target: Target, draft: Draft, rule: str, scheduler: str) -> None:
    wanted, other = exactly_penalised(target, 0.9), exact(target, (0.9, 0, 1.0))
    assert abs(float(wanted.sum()) - 1) < 1e-9 and int((wanted == 0).sum()) > 0, "min-p left something out"
    free = KnownCost([1, 512], [0], [[1.0], [1.001]])  # so that a draft whose tokens are mostly refused is verified
    counts, accepted = decode(target, draft, "dspark", rule, scheduler, (0.9, 0, 1.0), cost=free, **PENALTIES)
    assert p_value(counts, wanted) > 1e-4
    assert 0.03 < accepted < 0.95
    # Power: the same counts are not those of the unpenalised target.
    assert p_value(counts, other) < 1e-6


def _gullible(
    choice: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    accepted, following = _right(choice, tokens, lengths, starts)
    fooled = torch.arange(len(lengths)) % 4 == 0
    accepted = torch.where(fooled, lengths, accepted)
    return accepted, torch.where(fooled, choice[starts[:-1] + accepted], following)


@pytest.mark.parametrize(
    ("rule", "scheduler", "part", "fault"),
    [
        # A correction drawn from p instead of what p has over q.
        ("ratio", "fixed", "_residual", lambda p, *_: p),
        # What is drafted for every fourth request is taken as it is.
        ("coupled", "global", "_accept_equal", _gullible),
    ],
)
def test_a_faulty_verifier_is_caught(
    target: Target, draft: Draft, monkeypatch: pytest.MonkeyPatch, rule: str, scheduler: str, part: str, fault: Any
) -> None:
    """The statistics above refuse, with as many draws, what a verifier gets wrong."""
    wanted = exact(target, ASKS["plain"])
    monkeypatch.setattr(sys.modules["draftline_kernels.verify"], part, fault)
    counts, _ = decode(target, draft, "dspark", rule, scheduler, ASKS["plain"], draws=PAIRED)
    assert p_value(counts, wanted) < 1e-6


def test_a_draft_that_lies_about_its_distribution_is_caught(target: Target, draft: Draft) -> None:
    """The same statistics refuse the ratio rule when q is not what the block was drawn from (a little off: it takes
    more draws than one pairing has)."""
    wanted = exact(target, ASKS["plain"])
    from pipeline.decoding.proposers.dspark import DSparkProposer

    inner = DSparkProposer.propose

    def propose(self: DSparkProposer, sequences: list) -> Proposal:  # type: ignore[type-arg]
        proposal = inner(self, sequences)
        assert proposal.logits is not None
        proposal.logits = proposal.logits * 0.3  # flatter than what was drawn from
        return proposal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSparkProposer, "propose", propose)
        counts, _ = decode(target, draft, "dspark", "ratio", "fixed", ASKS["plain"])
    assert p_value(counts, wanted) < 1e-6
