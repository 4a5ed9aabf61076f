"""Verification keeps what the target would have said: greedy exactly, sampled in distribution, for both rules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from draftline_kernels import Sampling, draw, proposal_stream, transform, verify
from tests.statistical.chi_square import p_value

V, K = 5, 2
DRAWS = 150_000


def world(seed: int, vocabulary: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A Markov target and draft: logits of the next token after each token, [V, V] and [V, Vd]."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(V, V, generator=generator)
    draft = target + 0.8 * torch.randn(V, V, generator=generator)
    return target, draft if vocabulary is None else draft[:, vocabulary]


Ask = tuple[float, int, float, float]
"""Temperature, top_k, top_p, min_p."""


def exact(target: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Probability float64[V, V] of the two tokens after token 0."""
    n = torch.ones(V)
    p = transform(target, n * ask[0], (n * ask[1]).long(), n * ask[2], n * ask[3]).double().softmax(-1)
    return p[0][:, None] * p


def two_tokens(rule: str, ask: Ask, vocabulary: torch.Tensor | None = None, fault: str = "") -> torch.Tensor:
    """Counts int64[V, V] of the two tokens after token 0, decoded with speculation DRAWS times."""
    target, draft = world(3, vocabulary)
    n = DRAWS
    sampling = Sampling.of([(*ask[:3], i, ask[3]) for i in range(n)])
    positions = torch.full((n,), 6)
    d2t = vocabulary
    previous = torch.zeros(n, dtype=torch.int64)
    tokens, logits = [], []
    for k in range(K):
        q = transform(draft[previous], sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        anchor = positions if rule == "ratio" else None
        previous = draw(q, sampling.seed, positions + 1 + k, d2t, stream=proposal_stream(rule), anchor=anchor)
        tokens.append(previous)
        logits.append(q)
    block = torch.stack(tokens, 1)
    # Lengths differ by request, as a scheduler's do; they are set before anything is drawn.
    lengths = torch.arange(n) % (K + 1)
    cumulative = torch.cat((torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)))
    before = torch.cat((torch.zeros(n, 1, dtype=torch.int64), block), 1)
    keep = torch.arange(K + 1) <= lengths[:, None]
    q = torch.stack(logits, 1)
    if fault == "wrong q":
        q = q + torch.tensor([0.3] + [0.0] * (q.shape[-1] - 1))
    result = verify(
        target[before[keep]],
        block,
        lengths,
        cumulative,
        sampling,
        positions,
        rule,
        q if rule == "ratio" and fault != "no q" else None,
        d2t,
    )
    assert bool(result.finite.all())
    text = torch.cat((block, torch.zeros(n, 1, dtype=torch.int64)), 1)
    text.scatter_(1, result.accepted[:, None], result.next_token[:, None])
    # Where one token came out, the next round is plain decoding: the bonus token of an empty proposal.
    short = (result.accepted == 0).nonzero().squeeze(-1)
    again = verify(
        target[text[short, 0]],
        torch.zeros(len(short), 0, dtype=torch.int64),
        torch.zeros(len(short), dtype=torch.int64),
        torch.arange(len(short) + 1),
        sampling.select(short),
        positions[short] + 1,
        rule,
    )
    text[short, 1] = again.next_token
    return torch.bincount(text[:, 0] * V + text[:, 1], minlength=V * V).view(V, V)


ASKS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.2, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.3)]


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_emitted_tokens_follow_the_target(rule: str, ask: Ask) -> None:
    counts = two_tokens(rule, ask)
    assert p_value(counts.flatten(), exact(world(3)[0], ask).flatten()) > 1e-4


def test_tokens_drawn_from_an_unknown_draft_are_exact_too() -> None:
    """Without q a token counts as certain: fewer are kept, the distribution stays."""
    counts = two_tokens("ratio", (1.0, 0, 1.0, 0.0), fault="no q")
    assert p_value(counts.flatten(), exact(world(3)[0], (1.0, 0, 1.0, 0.0)).flatten()) > 1e-4


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_a_draft_vocabulary_leaves_the_distribution_alone(rule: str) -> None:
    counts = two_tokens(rule, (1.0, 0, 1.0, 0.0), torch.tensor([1, 2, 4]))
    assert p_value(counts.flatten(), exact(world(3)[0], (1.0, 0, 1.0, 0.0)).flatten()) > 1e-4


@pytest.mark.parametrize("fault", ["wrong q", "no residual"])
def test_a_faulty_verifier_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test refuses q that is not what was drawn from, and a correction drawn from p itself."""
    if fault == "no residual":
        monkeypatch.setattr(sys.modules["draftline_kernels.verify"], "_residual", lambda p, *_: p)
    counts = two_tokens("ratio", (1.0, 0, 1.0, 0.0), fault=fault)
    wanted = exact(world(3)[0], (1.0, 0, 1.0, 0.0)).flatten()
    share = counts.flatten().double() / DRAWS
    assert p_value(counts.flatten(), wanted) < 1e-6
    if fault == "wrong q":
        assert float((share - wanted).abs().max()) < 0.01, "a bias below 1 % is what it must see"


def test_ratio_accepts_one_minus_total_variation() -> None:
    target, draft = world(3)
    n = DRAWS
    sampling = Sampling.of([(1.0, 0, 1.0, i) for i in range(n)])
    positions = torch.full((n,), 2)
    q = draft[0].expand(n, 1, -1)
    tokens = draw(draft[:1].expand(n, -1), sampling.seed, positions + 1, stream="draft", anchor=positions)
    lengths = torch.ones(n, dtype=torch.int64)
    rows = torch.stack((torch.zeros(n, dtype=torch.int64), tokens), 1).flatten()
    result = verify(target[rows], tokens[:, None], lengths, torch.arange(n + 1) * 2, sampling, positions, "ratio", q)
    wanted = 1 - 0.5 * float((target[0].double().softmax(-1) - draft[0].double().softmax(-1)).abs().sum())
    assert abs(float(result.accepted.double().mean()) - wanted) < 5 * (wanted * (1 - wanted) / n) ** 0.5


def greedy_by_hand(logits: torch.Tensor, tokens: torch.Tensor, lengths: list[int]) -> tuple[list[int], list[int]]:
    accepted, following, row = [], [], 0
    for b, length in enumerate(lengths):
        best = [int(r.argmax()) for r in logits[row : row + length + 1]]
        kept = 0
        while kept < length and int(tokens[b, kept]) == best[kept]:
            kept += 1
        accepted.append(kept)
        following.append(best[kept])
        row += length + 1
    return accepted, following


@pytest.mark.parametrize("width", [9, 700])
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_greedy_rows_in_a_mixed_batch(rule: str, width: int) -> None:
    """Greedy requests follow the argmax, whatever samples beside them, under either rule."""
    torch.manual_seed(width)
    batch, block = 24, 4
    lengths = torch.randint(0, block + 1, (batch,))
    cumulative = torch.cat((torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)))
    logits = torch.randn(int(cumulative[-1]), width)
    tokens = torch.randint(0, width, (batch, block))
    for b in range(batch):  # make prefixes right, so that every accepted count occurs
        for k in range(int(torch.randint(0, block + 1, ()))):
            if k < int(lengths[b]):
                tokens[b, k] = logits[int(cumulative[b]) + k].argmax()
    wanted = greedy_by_hand(logits, tokens, lengths.tolist())
    for mixed in (False, True):
        rows = [(0.8 if mixed and b % 2 else 0.0, 0, 1.0, b) for b in range(batch)]
        q = torch.randn(batch, block, width) if mixed and rule == "ratio" else None
        got = verify(logits, tokens, lengths, cumulative, Sampling.of(rows), torch.arange(batch), rule, q)
        for b in range(0, batch, 2 if mixed else 1):
            assert (int(got.accepted[b]), int(got.next_token[b])) == (wanted[0][b], wanted[1][b])
    assert len(set(wanted[0])) >= 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_spares_the_others(value: float, rule: str, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 8)
    logits[2, 3] = value
    args: dict[str, Any] = {
        "tokens": torch.zeros(3, 1, dtype=torch.int64),
        "lengths": torch.tensor([1, 1, 1]),
        "cu_lengths": torch.tensor([0, 2, 4, 6]),
        "sampling": Sampling.of([(temperature, 0, 1.0, i) for i in range(3)]),
        "positions": torch.tensor([1, 2, 3]),
        "rule": rule,
    }
    got = verify(logits, **args)
    assert got.finite.tolist() == [True, False, True]
    assert int(got.next_token[1]) == -1 and int(got.accepted[1]) == 0
    clean = logits.clone()
    clean[2, 3] = 0.0
    expected = verify(clean, **args)
    for b in (0, 2):
        assert int(got.next_token[b]) == int(expected.next_token[b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "exact"}, "rule 'exact'"),
        ({"lengths": torch.tensor([3, 0])}, "lengths"),
        ({"cu_lengths": torch.tensor([0, 2, 4])}, "cu_lengths"),
        ({"tokens": torch.tensor([[9], [0]])}, "outside the target vocabulary"),
        ({"positions": torch.tensor([1])}, "positions"),
        ({"lengths": torch.tensor([1.0, 0.0])}, "lengths is torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "target_logits": torch.zeros(3, 8),
        "tokens": torch.zeros(2, 1, dtype=torch.int64),
        "lengths": torch.tensor([1, 0]),
        "cu_lengths": torch.tensor([0, 2, 3]),
        "sampling": Sampling.of([(1.0, 0, 1.0, 0)] * 2),
        "positions": torch.tensor([1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        verify(**{**good, **change})
