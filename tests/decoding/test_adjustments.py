"""Bias, penalties, min-p and log-probabilities: those of plain decoding, whatever drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from draftline_kernels import Adjustment, Overrides, Said, Touched, touched
from pipeline.config import TargetConfig
from pipeline.decoding import Request, verification
from pipeline.decoding.plan import plan_step
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.proposers.drawing import Asked, Drawing
from pipeline.decoding.request import Sequence
from pipeline.decoding.verification import Verification
from pipeline.errors import DraftlineError
from pipeline.target import Target, load_target
from tests.decoding.samples import ADJUSTED, KINDS, engine_with, prompt_ids, proposer_for


def oracle(logits: torch.Tensor, request: Request, answer: list[int]) -> torch.Tensor:
    """A row [V] adjusted token by token in float64."""
    z = logits.double().clone()
    for token, bias in request.logit_bias.items():
        z[token] += bias
    for token in {*request.prompt_ids, *answer}:
        z[token] = z[token] / request.repetition_penalty if z[token] > 0 else z[token] * request.repetition_penalty
    for token in set(answer):
        z[token] -= request.frequency_penalty * answer.count(token) + request.presence_penalty
    return z


def test_16_bit_logits_are_adjusted_as_in_float64() -> None:
    # Between 16 and 32 two logits of bfloat16 are 0.125 apart, so that half of these would round to nothing.
    logits = (20 + 10 * torch.rand(1 + 8 + 1, 400, generator=torch.Generator().manual_seed(2))).bfloat16()
    logits[0, 7] = logits[0, 9] = 35.0
    asked = [
        Request([1, 2], presence_penalty=0.05, logprobs=1),
        Request([3], repetition_penalty=1.003, presence_penalty=0.03, frequency_penalty=0.02,
                logit_bias={i: 0.011 * i for i in range(0, 400, 7)}),
        Request([3]),
    ]  # fmt: skip
    answers = [[7], list(range(100, 200)), [5]]
    sequences = [Sequence(r, frozenset(), [*r.prompt_ids, *a]) for r, a in zip(asked, answers, strict=True)]
    block = [350, 351, 350, 352, 353, 350, 354]
    tokens = torch.tensor([[0] * 7, block, [0] * 7])
    proposal = Proposal(tokens, torch.tensor([0, 7, 0]), torch.full((3, 7), 0.5))
    for s in sequences:
        s.computed = len(s.tokens) - 1
    plan = plan_step(sequences, sequences, proposal, [0, 7, 0], prefill=0)
    raw = logits.clone()
    step = Verification(plan, raw, "coupled")
    assert raw.dtype == torch.bfloat16 and torch.equal(raw, logits), "the target's logits stay as they are"
    picks = [int(oracle(logits[1 + i], asked[1], answers[1] + block[:i]).argmax()) for i in range(8)]
    accepted = next(i for i, (mine, theirs) in enumerate(zip(block, picks, strict=False)) if mine != theirs)
    first = int(oracle(logits[0], asked[0], answers[0]).argmax())
    assert first == 9 and int(logits[0].argmax()) == 7, "the penalty decides"
    assert step.result.next_token.tolist() == [first, picks[accepted], int(logits[-1].float().argmax())]
    (said,) = step.logprobs(0, [first]) or []
    assert said.logprob == float(logits[0].float().log_softmax(-1)[first]), "the target's own, unpenalised"
    # Every row of the block, as if all before it had been taken.
    part = touched(asked[1].adjustment, prompt=[3], answer=answers[1], proposed=block, vocabulary=400)
    overrides = Overrides.of([part], [8], 400)
    assert overrides is not None
    values, row, column = overrides.values(logits[1:9])
    rows = logits[1:9].float().index_put((row, column), values)
    for i, adjusted in enumerate(rows):
        wanted = oracle(logits[1 + i], asked[1], answers[1] + block[:i])
        torch.testing.assert_close(adjusted.double(), wanted, rtol=1e-6, atol=0)


def plain(target: Target, prompt: list[int], count: int) -> list[int]:
    """Greedy text under ADJUSTED, one token at a time with transformers' forward and no code of the engine's."""
    text: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            z = target.model(torch.tensor([prompt + text])).logits[0, -1].float()
        for token, bias in ADJUSTED["logit_bias"].items():
            z[token] += bias
        z = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + text]), z[None])[0]
        for token in set(text):
            z[token] -= 0.4 + 0.6 * text.count(token)
        text.append(int(z.argmax()))
        if text[-1] in target.eos_ids:
            break
    return text


@pytest.mark.parametrize("name", ["none", "ngram", *KINDS])
def test_penalised_greedy_text_is_plain_decodings(tiny: Target, name: str) -> None:
    prompts = prompt_ids(tiny)
    wanted = [plain(tiny, p, 40) for p in prompts]
    done = engine_with(tiny, name).generate([Request(p, max_new_tokens=40, **ADJUSTED) for p in prompts])
    assert [d.token_ids for d in done] == wanted
    unpenalised = engine_with(tiny, name).generate([Request(p, max_new_tokens=40) for p in prompts])
    assert [d.token_ids for d in unpenalised] != wanted


def test_a_seed_gives_one_text_under_penalties_whatever_drafts_and_beside_whom(tiny: Target) -> None:
    prompts = prompt_ids(tiny)
    asked = [Request(p, max_new_tokens=30, temperature=0.9, seed=i, **ADJUSTED) for i, p in enumerate(prompts)]
    texts = []
    for name in ("none", *KINDS):
        engine = engine_with(tiny, name)
        texts.append(
            [c.token_ids for c in engine.generate([Request(**vars(r) | {"id": f"{name}{r.id}"}) for r in asked])]
        )
    alone = engine_with(tiny, "dspark", max_requests=1)
    texts.append([c.token_ids for r in asked for c in alone.generate([r])])
    assert all(t == texts[0] for t in texts)


@pytest.mark.parametrize("name", ["none", "dspark"])
def test_logprobs_are_the_targets_own_whatever_is_asked(
    tiny: Target,
    cache_dir: Path,
    name: str,
) -> None:
    fresh = load_target(TargetConfig(path="tiny"), cache_dir)  # the engine takes the other one over
    prompts = prompt_ids(tiny)
    heard: dict[str, list[Any]] = {}

    def hear(event: Any) -> None:
        heard.setdefault(event.request_id, []).extend(event.logprobs or [])

    asked = [Request(p, max_new_tokens=12, logprobs=3, **(ADJUSTED if i else {})) for i, p in enumerate(prompts)]
    silent = Request(prompts[0], max_new_tokens=5)
    done = engine_with(tiny, name).generate([*asked, silent], hear)
    assert done[-1].logprobs is None and not heard[silent.id]
    for request, completion in zip(asked, done, strict=False):
        assert completion.logprobs is not None and heard[request.id] == completion.logprobs
        text = request.prompt_ids + completion.token_ids
        with torch.no_grad():
            logs = fresh.model(torch.tensor([text])).logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1)
        for row, token, said in zip(logs, completion.token_ids, completion.logprobs, strict=True):
            assert said.token_id == token and said.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [v for _, v in said.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", ["none", "dspark"])
def test_a_request_whose_logits_can_t_be_adjusted_ends_alone(
    tiny: Target,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tokens: int,
) -> None:
    prompts = prompt_ids(tiny)
    asked = [Request(p, 24, id=f"{i}", logprobs=0, **({} if i == 2 else ADJUSTED)) for i, p in enumerate(prompts)]
    wanted = engine_with(tiny, name).generate(asked)

    class Broken(Said):
        def __init__(self, adjustment: Adjustment, prompt: list[int], vocabulary: int) -> None:
            super().__init__(adjustment, prompt, vocabulary)
            self.breaks = prompt == prompts[1]

        def touched(self, proposed: Any) -> Touched:
            if self.breaks and self.answered >= tokens:
                raise IndexError("index 5 is out of bounds")
            return super().touched(proposed)

    monkeypatch.setattr(verification, "Said", Broken)
    engine = engine_with(tiny, name)
    done = engine.generate(asked)
    failed = done.pop(1)
    assert [(d.token_ids, d.finish_reason) for d in done] == [
        (d.token_ids, d.finish_reason) for i, d in enumerate(wanted) if i != 1
    ]
    assert failed.finish_reason == "error" and failed.token_ids == wanted[1].token_ids[: len(failed.token_ids)]
    assert len(failed.token_ids) >= tokens and len(failed.token_ids) < len(wanted[1].token_ids)
    cause = f"IndexError after {len(failed.token_ids)} tokens: index 5 is out of bounds"
    assert failed.error == f"its logits could not be adjusted: {cause}"
    assert not engine.has_work and engine.runner.pool.available == engine.runner.pool.pages


def test_a_block_drawn_in_one_is_drawn_under_min_p(tiny: Target) -> None:
    draft = proposer_for(tiny, "dspark").draft
    base = torch.randn(2, len(draft.temperatures), len(draft.d2t), generator=torch.Generator().manual_seed(0))
    tokens = []
    for min_p in (1.0, 0.0):
        asked = [Request([5, 6], temperature=1.0, seed=i, min_p=min_p) for i in range(2)]
        sequences = [Sequence(r, frozenset(), [5, 6]) for r in asked]
        drawing = Drawing(draft, Asked.of(sequences, torch.device("cpu")), "coupled")
        tokens.append(drawing.in_one(base, None, None, lambda seen: torch.zeros(seen.shape)).tokens)
    assert torch.equal(tokens[0], draft.d2t[base.argmax(-1)]), "nothing but the likeliest is left"
    assert not torch.equal(tokens[0], tokens[1])


def test_several_samples_of_one_request_are_several_seeds(tiny: Target) -> None:
    request = Request(prompt_ids(tiny)[0], max_new_tokens=12, temperature=1.0, seed=5)
    done = engine_with(tiny, "none").generate(request.samples(3))
    assert len({tuple(d.token_ids) for d in done}) == 3
    (second,) = engine_with(tiny, "dspark").generate([Request(request.prompt_ids, 12, temperature=1.0, seed=6)])
    assert done[1].token_ids == second.token_ids


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("min_p", 1.5, "min_p is 1.5"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0"),
        ("presence_penalty", 3.0, "presence_penalty is 3.0"),
        ("frequency_penalty", float("nan"), "frequency_penalty is nan"),
        ("logit_bias", {9999: 1.0}, "logit_bias is 9999"),
        ("logit_bias", {3: 200.0}, r"logit_bias\[3\] is 200.0"),
        ("logprobs", 21, "logprobs is 21"),
    ],
)
def test_a_value_out_of_range_is_named(tiny: Target, field: str, value: Any, words: str) -> None:
    with pytest.raises(DraftlineError, match=words):
        engine_with(tiny, "none").submit(Request([5, 6], **{field: value}))
