"""A tape that stands in for CUDA graphs where there is no GPU.

It notes every tensor operation that a step does, with the tensors and numbers of that moment, and does them again, over
the same tensors, when it is replayed. So whatever a step takes from the host when it is recorded stays as it was, as it
does in a graph, and comes out wrong if it should not have. Operations that would wait for the device, or make a tensor
of numbers on the host, are refused, as a graph can't hold them (but for `tolist`, `numpy` and `cpu`, which are no
operations on the CPU: what they read stays as it was). The kernels (attention over pages, the draw of a slot) are
single operations to it, done by their references. What a recorder's other recordings left is spoilt by a replay, as
they share memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import draftline_kernels
from draftline_kernels import Sampling
from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request, StepCost, runner, table_layout
from pipeline.decoding.proposers import drawing
from pipeline.decoding.recorded import Recorded
from pipeline.target import Target
from tests.decoding.samples import prompt_ids

WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "unique")
WAITING += ("repeat_interleave", "masked_select", "bincount")


class _Tape(TorchDispatchMode):
    """Notes operations."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = "aten.index" in str(func) and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in tree_flatten(args[1:])[0]
        )
        if by_mask or any(name in str(func) for name in WAITING):
            raise RuntimeError(f"{func} would wait for the device")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, before in self.done:
            now = func(*args, **kwargs)
            for old, new in zip(tree_flatten(before)[0], tree_flatten(now)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Makes recorders: one for the target, one for every draft."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self) -> Callable[[Callable[[], Any]], Recorded[Any]]:
        outs: list[Any] = []

        def record(body: Callable[[], Any]) -> Recorded[Any]:
            tape = _Tape()
            with tape:
                out = body()
            self.made += 1
            outs.append(out)

            def replay() -> None:
                self.replayed += 1
                # Graphs of one recorder share memory: what another left is gone.
                for other in outs:
                    for lost in _tensors(other) if other is not out else []:
                        lost.fill_(float("nan") if lost.is_floating_point() else -1)
                tape.replay()

            return Recorded(out, replay)

        return record


def _tensors(out: Any) -> list[torch.Tensor]:
    parts = vars(out).values() if dataclasses.is_dataclass(out) else out
    return [t for t in parts if isinstance(t, torch.Tensor)]


@torch.library.custom_op("draftline_tests::attend", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    context: torch.Tensor,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    few: bool,
) -> torch.Tensor:
    """Attention over pages by its definition."""
    return draftline_kernels.ragged_paged_attention(
        q, k, v, table, starts, context,
        page_size=page_size, scale=scale, window=window, softcap=softcap, causal=causal,
    )  # fmt: skip


@torch.library.custom_op("draftline_tests::slot", mutates_args=())
def _slot(
    base: torch.Tensor,
    previous: torch.Tensor,
    anchors: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    min_p: torch.Tensor,
    d2t: torch.Tensor,
    vocabulary: int,
    rule: str,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot's tokens and logits by their definition."""
    block = draftline_kernels.markov_block(
        base, None, None, previous, anchors, Sampling(temperature, top_k, top_p, seed, min_p),
        vocabulary=vocabulary, d2t=d2t, rule=rule, logits=True, first=first,
    )  # fmt: skip
    assert block.logits is not None
    return block.tokens, block.logits


def _slots(
    base: torch.Tensor,
    code: Any,
    w2: Any,
    previous: torch.Tensor,
    anchors: torch.Tensor,
    sampling: Sampling,
    **options: Any,
) -> draftline_kernels.Block:
    """`markov_block`, slot by slot."""
    asked = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.min_p)
    wanted, first = options.pop("logits"), options.pop("first")
    tokens, seen, kept = [], [], []
    for k in range(base.shape[1]):
        z = base[:, k].float()
        if code is not None:
            z = z + torch.nn.functional.linear(code(k, previous).to(w2.dtype), w2).float()
        seen.append(previous)
        drawn, logits = _slot(z[:, None], previous, anchors, *asked, first=first + k, **options)
        previous = drawn[:, 0]
        tokens.append(previous)
        kept.append(logits[:, 0])
    logits = torch.stack(kept, 1) if wanted else None
    return draftline_kernels.Block(torch.stack(tokens, 1), torch.stack(seen, 1), logits)


def record_on_tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Engines made from now on record their steps on tapes."""
    made = Tapes()
    init = runner.TargetRunner.__init__
    monkeypatch.setattr(runner.TargetRunner, "__init__", lambda self, *args: init(self, *args, recorder=made))
    monkeypatch.setattr(table_layout, "ragged_paged_attention", _attend)
    monkeypatch.setattr(drawing, "markov_block", _slots)
    return made


def steady_engine(target: Target, proposer: Any = None, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"max_requests": 4, "max_context": 256, "threads": 1, "prefill_chunk": 16, "prepack": False, **settings}
    )
    cost = StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]])
    # Fixed costs, so that two engines choose alike.
    cost.observe = cost.observe_draft = lambda *_: None  # type: ignore[method-assign]
    return Engine(target, config, proposer, cost)


def requests(target: Target, **asked: Any) -> list[Request]:
    ids = prompt_ids(target)
    return [Request(p, max_new_tokens=20 + 5 * i, **{"seed": i, **asked}) for i, p in enumerate(ids)]


def launched(engine: Engine, proposer: Any) -> Engine:
    """The same engine, whose steps are launched operation by operation; it fills the same sizes of step."""
    engine.runner._replays = engine.runner.terms = None
    engine.set_proposer(proposer)
    return engine


def rounds_of(engine: Engine, asked: list[Request]) -> tuple[list[list[int]], list[Any]]:
    """Texts, and of each round what was drafted: lengths, accepted tokens and raw confidences."""
    rounds: list[Any] = []
    engine.on_round = rounds.append
    return [d.token_ids for d in engine.generate(asked)], rounds


def assert_same(given: tuple[list[list[int]], list[Any]], expected: tuple[list[list[int]], list[Any]]) -> None:
    assert given[0] == expected[0]
    assert len(given[1]) == len(expected[1])
    for a, b in zip(given[1], expected[1], strict=True):
        assert (a.lengths.tolist(), a.accepted.tolist()) == (b.lengths.tolist(), b.accepted.tolist())
        if a.raw_confidence is not None:
            torch.testing.assert_close(a.raw_confidence, b.raw_confidence, rtol=1e-4, atol=1e-4)
