"""What a step does no more often than it has to: reads from the device, copies of logits, searches, page tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from draftline_kernels import Adjustment, Said, markov_block
from pipeline.decoding import Request, attention, make_proposer, verification
from pipeline.decoding.attention import StepLayout
from pipeline.decoding.plan import plan_step
from pipeline.decoding.proposers import drawing
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence
from pipeline.decoding.verification import Verification
from pipeline.target import Target
from tests.decoding.samples import ADJUSTED, engine_with, prompt_ids
from tests.drafts.samples import small_draft


class Watched(torch.Tensor):
    """Tells when the host reads it, or a part of it: on a GPU it would wait for the device each time."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "item", "__int__", "__index__", "numpy", "cpu", "__float__", "__bool__"):
            cls.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("asked", [{}, ADJUSTED], ids=["plain", "penalties"])
def test_drafted_tokens_are_read_once_a_step(
    tiny: Target,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
) -> None:
    engine = engine_with(tiny, "dspark", scheduler="fixed")
    inner, rounds = engine.proposer.propose, []

    def propose(sequences: list[Sequence]) -> Any:
        rounds.append(len(sequences))
        p = inner(sequences)
        return dataclasses.replace(p, tokens=p.tokens.as_subclass(Watched))

    verify = verification.verify

    def unwatched(logits: torch.Tensor, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        return verify(logits, tokens.as_subclass(torch.Tensor), *args, **options)  # looks at values on the CPU only

    monkeypatch.setattr(Watched, "reads", 0)
    monkeypatch.setattr(engine.proposer, "propose", propose)
    monkeypatch.setattr(verification, "verify", unwatched)
    done = engine.generate([Request(p, max_new_tokens=12, **asked) for p in prompt_ids(tiny)[:3]])
    assert len(rounds) > 3 and max(rounds) == 3 and all(d.metrics.drafted for d in done)
    assert Watched.reads == len(rounds)


@pytest.mark.parametrize("name", ["none", "dspark"])
def test_a_text_under_penalties_is_listed_once(
    tiny: Target,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """A step lists what was emitted since the one before, and its own proposal."""
    made, added = [], []

    class Counted(Said):
        def __init__(self, adjustment: Adjustment, prompt: list[int], vocabulary: int) -> None:
            super().__init__(adjustment, prompt, vocabulary)
            made.append(len(prompt))

        def add(self, answer: list[int]) -> None:  # type: ignore[override]
            super().add(answer)
            added.append(len(answer))

    monkeypatch.setattr(verification, "Said", Counted)
    prompts = prompt_ids(tiny)[:3]
    silent = Request(prompts[0], max_new_tokens=20)
    done = engine_with(tiny, name).generate([silent, *(Request(p, max_new_tokens=20, **ADJUSTED) for p in prompts)])
    assert sorted(made) == sorted(len(p) for p in prompts), "nothing of whoever asks for nothing"
    assert 0 < sum(added) < sum(len(d.token_ids) for d in done[1:])


def test_log_probabilities_are_read_once_for_all_tokens_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 90_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    sequences = [Sequence(Request([1, 2], logprobs=n), frozenset(), [1, 2, 3]) for n in (5, 0)]
    for s in sequences:
        s.computed = 2
    proposal = Proposal(torch.tensor([[4, 5], [6, 7]]), torch.tensor([2, 2]), torch.full((2, 2), 0.5))
    step = Verification(plan_step(sequences, sequences, proposal, [2, 2], prefill=0), logits, "coupled")
    monkeypatch.setattr(step, "_logits", logits.as_subclass(Watched))
    for index, tokens in enumerate(([4, 89_999, 7], [6, 9])):
        monkeypatch.setattr(Watched, "reads", 0)
        said = step.logprobs(index, tokens)
        assert said is not None and Watched.reads == 1
        rows = logits[3 * index : 3 * index + len(tokens)].float().log_softmax(-1)
        for row, token, entry in zip(rows, tokens, said, strict=True):
            best = row.topk((5, 0)[index])
            assert (entry.token_id, entry.logprob) == (token, float(row[token]))
            assert entry.top == list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_a_block_s_logits_are_handed_on_as_the_kernel_wrote_them(
    tiny: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under the ratio rule: float32[B, K, Vd], several hundred MB at full size."""
    made: list[Any] = []

    def watch(*args: Any, **options: Any) -> Any:
        made.append(markov_block(*args, **options))
        return made[-1]

    monkeypatch.setattr(drawing, "markov_block", watch)
    proposer = make_proposer("dspark", small_draft(tiny), rule="ratio", pack=False)
    proposer._fused = True  # type: ignore[attr-defined]
    engine = engine_with(tiny, "none", "ratio", scheduler="early_stop")
    engine.set_proposer(proposer)
    inner, handed = proposer.propose, []

    def propose(sequences: list[Sequence]) -> Any:
        handed.append(inner(sequences))
        return handed[-1]

    monkeypatch.setattr(proposer, "propose", propose)
    engine.generate([Request(p, max_new_tokens=6, temperature=1.0, seed=3) for p in prompt_ids(tiny)[:2]])
    assert handed and all(p.logits is block.logits for p, block in zip(handed, made, strict=True))


def test_an_eagle3_block_has_one_page_table(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots differ in where they begin, not in their pages. CUDA's path, here by the paged kernel's reference."""
    engine = engine_with(tiny, "eagle3", scheduler="fixed", page_size=4)
    made: list[str] = []

    def watch(owner: Any, method: str) -> None:
        inner = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *args: made.append(method) or inner(*args))

    def attend(layout: StepLayout, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shape = layout.geometry[layer]
        layout.cache.write(layer, layout.cells, k, v)
        return layout.by_kernel(shape, q)

    def texts() -> list[list[int]]:
        done = engine.generate([Request(p, max_new_tokens=24, ignore_eos=True) for p in prompt_ids(tiny)[:3]])
        return [c.token_ids for c in done]

    wanted = texts()
    watch(attention, "_page_table")
    watch(engine.runner, "step")
    watch(engine.proposer, "propose")
    monkeypatch.setattr(StepLayout, "attend", attend)
    assert texts() == wanted
    assert made.count("propose") > 3 and engine.proposer.block_size > 2
    assert made.count("_page_table") == made.count("step") + made.count("propose")
