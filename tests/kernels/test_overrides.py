"""Bias and penalties in verification: those of a dense computation, of transformers, and of plain decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from draftline_kernels import BLOCK, Adjustment, Overrides, Said, Sampling, Touched, touched, verify
from tests.kernels.override_cases import ASKS, HOT, LENGTHS, WIDTH, Case, same


def overridden(
    logits: torch.Tensor, adjustment: Adjustment, prompt: list[int], answer: list[int], proposed: list[int]
) -> torch.Tensor:
    """float32 [n, V], a request's rows with the new logits in place."""
    part = touched(adjustment, prompt=prompt, answer=answer, proposed=proposed, vocabulary=logits.shape[1])
    made = Overrides.of([part], [len(logits)], logits.shape[1])
    assert made is not None
    values, row, column = made.values(logits)
    return logits.to(torch.float32, copy=True).index_put((row, column), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asks", ASKS)
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_decisions_are_those_of_dense_logits(rule: str, asks: str, dtype: torch.dtype) -> None:
    changed = forgotten = 0
    for seed in range(4):
        case = Case(rule, asks, dtype, seed=seed)
        wanted = case.dense()
        arguments = case.arguments()
        assert same(verify(**arguments), wanted)
        assert int(wanted.accepted.max()) > 0 and bool((wanted.accepted < torch.tensor(LENGTHS)).any())
        changed += not same(verify(**arguments | {"overrides": None}), wanted)
        forgotten += not same(case.dense(forget_block=True), wanted)
    assert changed == 4 and forgotten > 0, "bias and penalties decide, and so does what is proposed in a block"


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_beside_a_draft_vocabulary(rule: str) -> None:
    others = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:500]
    case = Case(rule, "mixed", d2t=torch.cat((others, torch.tensor(HOT))).unique())
    assert same(verify(**case.arguments()), case.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asking", ["all", "some"])
def test_the_targets_logits_stay_as_they_are(asking: str, dtype: torch.dtype) -> None:
    case = Case("coupled", "mixed", dtype)
    if asking == "all":
        case.adjustments = [Adjustment(1.2, bias={5: 1.0})] * len(LENGTHS)
    arguments = case.arguments()
    before = arguments["target_logits"].clone()
    verify(**arguments)
    assert arguments["target_logits"].dtype == dtype and torch.equal(arguments["target_logits"], before)


def test_a_row_that_is_not_finite_spares_the_others() -> None:
    """A NaN in a touched token, one in an untouched one, and one in a request without overrides."""
    case = Case("coupled", "mixed")
    rows = [int(case.cumulative[b]) for b in (1, 4, 6)]
    for row, column in zip(rows, (BLOCK, 11, 3), strict=True):
        case.logits[row, column] = float("nan")
    got = verify(**case.arguments())
    assert got.finite.tolist() == [b not in (1, 4, 6) for b in range(8)]
    assert same(got, case.dense())


def test_repetition_is_transformers_own() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    prompt, answer = [3, 4, 5, 3], [7, 4]
    mine = overridden(logits, Adjustment(repetition=1.7), prompt, answer, [])
    ids = torch.tensor([prompt + answer])
    assert torch.equal(mine, RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()))


def test_a_row_of_a_block_counts_what_was_proposed_before_it() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 4] = float("-inf")
    adjustment = Adjustment(1.2, 0.3, 0.5, {9: 2.0, 4: 1.0})
    block = overridden(logits, adjustment, [1, 2], [9, 2], [9, 4, 9])
    for i, before in enumerate(([], [9], [9, 4], [9, 4, 9])):
        alone = overridden(logits[i : i + 1], adjustment, [1, 2], [9, 2, *before], [])
        assert torch.equal(block[i], alone[0]), i
    assert bool((block[:, 4] == float("-inf")).all())


def test_only_what_is_touched_is_listed() -> None:
    def ids(adjustment: Adjustment) -> list[int]:
        part = touched(adjustment, prompt=[9, 2], answer=[5, 2], proposed=[8], vocabulary=10)
        return part.columns.tolist()

    assert ids(Adjustment(bias={3: 1.0})) == [3]
    assert ids(Adjustment(presence=0.5)) == [2, 5, 8]
    assert ids(Adjustment(1.1, bias={3: 1.0})) == [2, 3, 5, 8, 9]
    nothing = touched(Adjustment(frequency=0.1), prompt=[9], answer=[], proposed=[], vocabulary=10)
    assert Overrides.of([None, nothing], [2, 1], 10) is None, "no kernel looks for what isn't there"


def test_entries_of_a_block_of_ids_lie_together() -> None:
    width = 3 * BLOCK
    bias = Adjustment(bias=dict.fromkeys((width - 1, BLOCK - 1, BLOCK, 0), 1.0))
    part = touched(bias, prompt=[], answer=[], proposed=[], vocabulary=width)
    made = Overrides.of([None, part, None, part], [1, 1, 2, 3], width)
    assert made is not None
    assert made.columns.tolist() == [0, BLOCK - 1, BLOCK, width - 1] * 2
    assert made.bounds.tolist() == [[0] * 4, [0, 2, 3, 4], [4] * 4, [4, 6, 7, 8]]
    assert made.size == 16 and made.at.tolist() == [0, 0, 4, 4, 4, 8, 12]
    assert made.lines.tolist() == [-1, 0, -1, 1]
    found = made.entries(width)
    assert found.shape == (2, width) and found.dtype == torch.int16, "a line for each request that asks"
    line, column = found.nonzero(as_tuple=True)
    assert column.tolist() == made.columns.tolist() and line.tolist() == [0] * 4 + [1] * 4
    assert found[line, column].tolist() == [1, 2, 1, 1] * 2


def test_a_block_of_which_every_id_is_touched_fits_its_line() -> None:
    part = touched(Adjustment(frequency=1.0), prompt=[], answer=range(2 * BLOCK), proposed=[], vocabulary=2 * BLOCK)
    made = Overrides.of([part], [1], 2 * BLOCK)
    assert made is not None
    assert torch.equal(made.entries(2 * BLOCK), torch.arange(1, BLOCK + 1).repeat(2)[None].to(torch.int16))


def test_again_names_every_later_row_of_a_proposed_token() -> None:
    presence = Adjustment(presence=0.5)
    parts = [
        touched(presence, prompt=[], answer=[4], proposed=said, vocabulary=10) if said is not None else None
        for said in ([6, 5, 6], None, [], [4])
    ]
    made = Overrides.of(parts, [4, 2, 1, 2], 10)
    assert made is not None
    counted = torch.zeros(made.size).index_add(0, made.again, torch.ones(len(made.again)))
    first = counted[:12].view(4, 3)  # of tokens 4, 5 and 6
    assert first.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 2]]
    assert counted[12:].tolist() == [0, 0, 1]


LISTED = ("columns", "bias", "counts", "prompted", "proposed")
IDS = st.lists(st.integers(0, 11), max_size=6)


@settings(deadline=None, max_examples=80)
@given(
    prompt=IDS,
    steps=st.lists(st.tuples(IDS, IDS), max_size=5),
    bias=st.dictionaries(st.integers(0, 11), st.integers(-3, 3).map(float), max_size=4),
    penalties=st.tuples(st.sampled_from((1.0, 1.5)), st.sampled_from((0.0, 0.5)), st.sampled_from((0.0, 0.5))),
)
def test_what_was_said_grows_as_it_would_be_listed_anew(
    prompt: list[int],
    steps: list[tuple[list[int], list[int]]],
    bias: dict[int, float],
    penalties: tuple[float, float, float],
) -> None:
    """Proposals leave no trace, and what a step was given stays as it was."""
    adjustment = Adjustment(*penalties, bias)
    said = Said(adjustment, prompt, 12)
    answer: list[int] = []
    given_out = []
    for emitted, proposed in steps:
        said.add(emitted)
        answer += emitted
        part = said.touched(proposed)
        given_out.append((part, [getattr(part, name).tolist() for name in LISTED]))
        anew = touched(adjustment, prompt=prompt, answer=answer, proposed=proposed, vocabulary=12)
        for name in LISTED:
            mine, theirs = getattr(part, name), getattr(anew, name)
            assert mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist(), name
        before = set(prompt) if adjustment.repetition != 1.0 else set()
        counted, block = (answer, proposed) if adjustment.penalises else ([], [])
        ids = sorted({*bias, *before, *counted, *block})
        assert part.columns.tolist() == ids and said.answered == len(answer)
        assert part.bias.tolist() == [bias.get(i, 0.0) for i in ids]
        assert part.counts.tolist() == [counted.count(i) for i in ids]
        assert part.prompted.tolist() == [i in before for i in ids]
        assert part.columns[part.proposed].tolist() == block
    assert all([getattr(part, name).tolist() for name in LISTED] == kept for part, kept in given_out)


def test_tokens_and_rows_that_do_not_fit_are_named() -> None:
    said = Said(Adjustment(1.2), [3], 10)
    with pytest.raises(ValueError, match="token -1 is outside the target vocabulary of 10"):
        said.add([4, -1])
    with pytest.raises(ValueError, match="token 11 is outside the target vocabulary of 10"):
        said.touched([11])
    with pytest.raises(ValueError, match="token 10 is outside the target vocabulary of 10"):
        touched(Adjustment(1.2), prompt=[3, 10], answer=[], proposed=[], vocabulary=10)
    part = touched(Adjustment(1.2), prompt=[3], answer=[], proposed=[4], vocabulary=10)
    with pytest.raises(ValueError, match="request 1 has 3 rows for 1 proposed tokens"):
        Overrides.of([None, part], [1, 3], 10)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("columns", lambda t: t.long(), r"overrides.columns is torch.int64 \[1\] on cpu; expected torch.int32 \[1\]"),
        ("bounds", lambda t: t[:1], r"overrides.bounds is torch.int32 \[1, 2\] on cpu; expected torch.int32 \[2, 2\]"),
        ("lines", lambda t: t.int(), r"overrides.lines is torch.int32 \[2\] on cpu; expected torch.int64 \[2\]"),
        ("bias", lambda t: t.double(), "overrides.bias is torch.float64"),
        ("counts", lambda t: t[:0], r"overrides.counts is torch.float32 \[0\]"),
        ("prompted", lambda t: t.float(), "overrides.prompted is torch.float32"),
        ("penalties", lambda t: t[:, :2], r"overrides.penalties is torch.float32 \[2, 2\]"),
        ("owner", lambda t: t[:2], r"overrides.owner is torch.int64 \[2\] on cpu; expected torch.int64 \[3\]"),
        ("at", lambda t: t.int(), "overrides.at is torch.int32"),
        ("again", lambda t: t.int(), "overrides.again is torch.int32"),
        ("at", lambda t: t.to("meta"), "overrides.at is .* on meta; expected torch.int64 .* on cpu"),
        ("owner", lambda t: t.flip(0), r"overrides have \[1, 2\] rows per request; lengths \+ 1 are \[2, 1\]"),
    ],
)
def test_overrides_that_do_not_fit_are_named(field: str, change: Any, message: str) -> None:
    part: Touched = touched(Adjustment(bias={3: 1.0}), prompt=[], answer=[], proposed=[], vocabulary=8)
    made = Overrides.of([part, None], [2, 1], 8)
    assert made is not None
    if message.startswith("overrides have"):
        change = lambda t: torch.tensor([0, 1, 1])  # noqa: E731
    with pytest.raises(ValueError, match=message):
        verify(
            torch.zeros(3, 8),
            torch.zeros(2, 1, dtype=torch.int64),
            torch.tensor([1, 0]),
            torch.tensor([0, 2, 3]),
            Sampling.of([(1.0, 0, 1.0, 0)] * 2),
            torch.tensor([1, 1]),
            overrides=dataclasses.replace(made, **{field: change(getattr(made, field))}),
        )
