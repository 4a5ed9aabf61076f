"""The vocabulary loss in its corners: softcap, no Markov head, labels outside, and the acceptance it reports."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.objectives import SurvivalWeights, vocab_loss
from tests.training.reference import dense_attention, dense_loss, training_attention

N, D, R, V = 23, 8, 3, 50
TERMS = ("ce", "kl", "l1", "rkl", "lk", "hybrid")


def _case(seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float64).normal_(0, 1, generator=g)

    d2t = torch.randperm(V, generator=g)[:vocabulary].sort().values
    return {
        "hidden": normal(N, D),
        "markov": normal(N, R),
        "w2": normal(vocabulary, R),
        "lm_head": normal(V, D),
        "d2t": d2t,
        "target_hidden": normal(N, D),
        "labels": torch.randint(-1, vocabulary, (N,), generator=g),
        **{f"{term}_weight": torch.rand(N, generator=g, dtype=torch.float64) for term in TERMS},
    }


def _best(logits: torch.Tensor, d2t: torch.Tensor) -> torch.Tensor:
    """Draft id of the most likely token of the whole vocabulary, -1 where the draft can't propose it."""
    t2d = torch.full((V,), -1)
    t2d[d2t] = torch.arange(len(d2t))
    return t2d[logits.argmax(-1)]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize("vocabulary", [20, V])
@pytest.mark.parametrize("chunk", [5, 64])
def test_loss_gradients_and_acceptance_equal_the_whole_vocabularys(
    softcap: float, markov: bool, vocabulary: int, chunk: int
) -> None:
    case = _case(1, vocabulary)
    if not markov:
        case["markov"] = case["w2"] = None  # type: ignore[assignment]
    inputs = [n for n in ("hidden", "markov", "w2") if case[n] is not None]
    exact = {n: case[n].clone().requires_grad_() for n in inputs}
    reference, acceptance = dense_loss(**{**case, **exact}, eta=2.0, softcap=softcap)
    reference.backward()

    single = {n: t if t is None or not t.is_floating_point() else t.float() for n, t in case.items()}
    mine = {n: single[n].clone().requires_grad_() for n in inputs}
    raw = single["target_hidden"] @ single["lm_head"].T
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    loss, stats = vocab_loss(
        mine["hidden"],
        mine.get("markov"),
        mine.get("w2"),
        single["lm_head"][case["d2t"]],
        single["target_hidden"],
        capped.logsumexp(-1),
        _best(capped, case["d2t"]),
        case["labels"],
        single["ce_weight"],
        single["kl_weight"],
        single["l1_weight"],
        **{f"{term}_weight": single[f"{term}_weight"] for term in TERMS[3:]},
        eta=2.0,
        softcap=softcap,
        chunk=chunk,
    )
    loss.backward()

    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(stats.acceptance.double(), acceptance, rtol=0, atol=2e-6)
    for name in inputs:
        # A row of acceptance a has a gradient of LK that float32 knows to about 1e-7 / a.
        torch.testing.assert_close(mine[name].grad.double(), exact[name].grad, rtol=2e-3, atol=1e-5)


def test_mass_that_the_draft_cannot_propose_lowers_acceptance() -> None:
    """A draft equal to the target on its own vocabulary is accepted no more often than the target stays inside."""
    case = _case(2, 20)
    logits = case["target_hidden"] @ case["lm_head"].T
    _, stats = vocab_loss(
        case["target_hidden"].float(),
        None,
        None,
        case["lm_head"][case["d2t"]].float(),
        case["target_hidden"].float(),
        logits.logsumexp(-1).float(),
        _best(logits, case["d2t"]),
        case["labels"],
        torch.ones(N),
        torch.ones(N),
        torch.ones(N),
    )
    inside = logits.softmax(-1)[:, case["d2t"]].sum(-1)
    torch.testing.assert_close(stats.acceptance.double(), inside, rtol=0, atol=2e-6)
    reachable = _best(logits, case["d2t"]) >= 0
    assert 0 < int(reachable.sum()) < N
    assert torch.equal(stats.agree, reachable), "greedy decoding rejects every proposal where the best token is outside"


def test_a_target_that_stays_outside_the_draft_vocabulary_gives_no_nan() -> None:
    """Nothing of p is inside: no KL, no gradient from it, and an acceptance of 0."""
    hidden = torch.randn(3, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = torch.eye(5, D)
    ones, none = torch.ones(3), torch.zeros(3)
    loss, stats = vocab_loss(
        hidden, None, None, rows, hidden.detach(), torch.full((3,), 500.0), -ones.long(), -ones.long(), none, ones, none
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros(3, D))
    assert torch.equal(stats.acceptance, none)


def test_position_weights_follow_survival() -> None:
    """By hand: chances 0.8 and 0.5 with floor 0.5 become 0.9 and 0.75, which reach 0.9 and 0.675."""
    weights = SurvivalWeights(2, floor=0.5, memory=0.5)
    assert weights.weights().tolist() == pytest.approx([1.0, 0.25 / 0.75]), "nothing observed: nothing survives"
    weights.observe(torch.tensor([8.0, 4.0]), torch.tensor(10.0))
    assert weights.weights().tolist() == pytest.approx([1.0, 0.675 / 1.575])
    weights.observe(torch.tensor([5.0, 5.0]), torch.tensor(5.0))
    again = SurvivalWeights(2, floor=0.5, memory=0.5)
    again.load(weights.state())
    # Of 10 blocks that count, 5 by half, 9 got past the first slot and 7 past both.
    reach = (1 + 0.9) / 2, (1 + 0.9) / 2 * (1 + 7 / 9) / 2
    assert again.weights().tolist() == pytest.approx([1.0, reach[1] / sum(reach)])
    assert torch.equal(again.weights(), weights.weights())
    with pytest.raises(ValueError, match="blocks of 3 have one more"):
        SurvivalWeights(3, floor=0.5, memory=0.5).load(weights.state())


def test_blocks_of_several_sequences_attend_as_under_one_dense_mask() -> None:
    """Grouped heads, sequences of other lengths, an anchor at position 0 (no context at all)."""
    g = torch.Generator().manual_seed(7)
    block, lengths = 3, [6, 11]
    anchors = [torch.tensor([0, 4]), torch.tensor([2, 3, 10])]
    count = 5 * block

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape).normal_(0, 1, generator=g)

    q, k, v = normal(count, 6, 4), normal(count, 2, 4), normal(count, 2, 4)
    context = normal(17, 2, 4), normal(17, 2, 4)
    mine = training_attention(q, k, v, context, lengths, anchors, block)
    reference = dense_attention(q, k, v, context, lengths, anchors, block)
    torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-5)
