"""What a step does no more often than it has to: reads from the device, copies of logits, searches, page tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from draftline_kernels import markov_block
from pipeline.decoding import Request, attention, make_proposer
from pipeline.decoding.attention import StepLayout
from pipeline.decoding.proposers import drawing
from pipeline.decoding.request import Sequence
from pipeline.target import Target
from tests.decoding.samples import ADJUSTED, engine_with, prompt_ids
from tests.drafts.samples import small_draft


class Watched(torch.Tensor):
    """Tells when the host reads it, or a part of it: on a GPU it would wait for the device each time."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "item", "__int__", "__index__", "numpy", "cpu"):
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

    monkeypatch.setattr(Watched, "reads", 0)
    monkeypatch.setattr(engine.proposer, "propose", propose)
    done = engine.generate([Request(p, max_new_tokens=12, **asked) for p in prompt_ids(tiny)[:3]])
    assert len(rounds) > 3 and max(rounds) == 3 and all(d.metrics.drafted for d in done)
    assert Watched.reads == len(rounds)


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
    watch(attention, "page_table")
    watch(engine.runner, "step")
    watch(engine.proposer, "propose")
    monkeypatch.setattr(StepLayout, "attend", attend)
    assert texts() == wanted
    assert made.count("propose") > 3 and engine.proposer.block_size > 2
    assert made.count("page_table") == made.count("step") + made.count("propose")
