"""The vocabulary loss off the GPU: what it holds, what it refuses, and that its grain changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftline_kernels import row_losses, vocab_loss
from draftline_kernels.vocab_loss import rows_per_chunk

N, D, R, V = 12, 6, 3, 40


def case() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    weight = torch.rand(3, N, generator=g)
    seen, rows = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return {
        "hidden": torch.randn(N, D, generator=g),
        "markov": torch.randn(N, R, generator=g),
        "w2": torch.randn(V, R, generator=g),
        "lm_rows": rows,
        "target_hidden": seen,
        "log_normaliser": (seen @ rows.T).logsumexp(-1),
        "target_best": (seen @ rows.T).argmax(-1),
        "labels": torch.randint(-1, V, (N,), generator=g),
        "ce_weight": weight[0],
        "kl_weight": weight[1],
        "l1_weight": weight[2],
    }


def run(inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Loss, acceptance and the three gradients."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("hidden", "markov", "w2")}
    loss, stats = vocab_loss(**{**inputs, **leaves}, **options)
    loss.backward()
    return [loss.detach(), stats.acceptance, stats.agree.float(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_chunks_and_groups_of_rows_change_nothing(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case()
    whole = run(inputs, softcap=softcap)
    monkeypatch.setattr(row_losses, "_CACHE_BYTES", 3 * V * 4)
    for got, wanted in zip(run(inputs, softcap=softcap, chunk=5), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_whole_vocabulary_needs_neither_normaliser_nor_best_token() -> None:
    inputs = case()
    alone = run({**inputs, "log_normaliser": None, "target_best": None})
    for got, wanted in zip(alone, run(inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, 64])
def test_output_rows_of_the_draft_s_own_get_their_gradient(chunk: int) -> None:
    """The target's logits come from its rows, the draft's from its own: what autograd makes of it in float64."""
    inputs = case()
    theirs = inputs["lm_rows"]
    own = (theirs + 0.3 * torch.randn(V, D, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss, _ = vocab_loss(**{**inputs, "lm_rows": own}, target_rows=theirs, chunk=chunk)
    loss.backward()
    plain = own.detach().double().requires_grad_()
    wide = {n: inputs[n].double() for n in ("hidden", "markov", "w2", "target_hidden")}
    log_q = (wide["hidden"] @ plain.T + wide["markov"] @ wide["w2"].T).log_softmax(-1)
    p = (wide["target_hidden"] @ theirs.double().T).softmax(-1)
    labels = inputs["labels"]
    ce = -log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)
    kl = (p * (p.log() - log_q)).sum(-1)
    l1 = (log_q.exp() - p).abs().sum(-1)
    wanted = (ce * inputs["ce_weight"] + kl * inputs["kl_weight"] + l1 * inputs["l1_weight"]).sum()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(own.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_bfloat16_products_stay_near_float32() -> None:
    inputs = case()
    narrow = run({**inputs, "lm_rows": inputs["lm_rows"].bfloat16()})
    torch.testing.assert_close(narrow[0], run(inputs)[0], rtol=0.02, atol=0)


def test_without_gradients_none_is_formed() -> None:
    """Held-out rows are scored without the second half of the work."""
    inputs = case()
    loss, stats = vocab_loss(**inputs)
    assert not loss.requires_grad and not stats.l1.requires_grad
    torch.testing.assert_close(loss, run(inputs)[0])


def test_an_acceptance_of_nearly_nothing_still_has_a_finite_gradient() -> None:
    """-log a where a underflows: the tangent, of a slope that the rows' own probabilities bring down."""
    inputs = case() | {"lm_rows": case()["lm_rows"] * 200}
    none = torch.zeros(N)
    got = run(
        {**inputs, "log_normaliser": None, "target_best": None, "lk_weight": torch.ones(N)}
        | dict.fromkeys(("ce_weight", "kl_weight", "l1_weight"), none)
    )
    assert float(got[1].min()) < 1e-6
    assert all(bool(t.isfinite().all()) for t in got)


def test_no_rows_are_no_loss() -> None:
    inputs = case()
    for name in inputs.keys() - {"w2", "lm_rows"}:
        inputs[name] = inputs[name][:0]
    got = run(inputs)
    assert float(got[0]) == 0 and torch.equal(got[-1], torch.zeros(V, R))


@pytest.mark.parametrize("rows", [1, 448, 5000])
@pytest.mark.parametrize("vocabulary", [4096, 151_936, 262_144])
def test_a_chunk_of_logits_is_bounded_whatever_the_vocabulary(rows: int, vocabulary: int) -> None:
    """That it is bounded is what makes a step of a large vocabulary fit."""
    chunk = rows_per_chunk(rows, vocabulary, 4, torch.device("cpu"))
    assert 1 <= chunk <= rows and chunk * vocabulary * 4 <= 80 << 20
    chunks = -(-rows // chunk)
    assert chunks * chunk - rows < chunks, "equal parts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markov": None}, "give both or neither"),
        ({"hidden": torch.zeros(N, D + 1)}, r"hidden has shape \[12, 7\].*expected \[12, 6\]"),
        ({"w2": torch.zeros(V - 1, R)}, r"w2 has shape \[39, 3\]"),
        ({"target_rows": torch.zeros(V, D + 1)}, r"target_rows has shape \[40, 7\]"),
        ({"labels": torch.full((N,), V)}, "a label is 40"),
        ({"labels": torch.zeros(N)}, "labels is torch.float32"),
        ({"ce_weight": torch.zeros(N - 1)}, r"ce_weight has shape \[11\]"),
        ({"lm_rows": torch.zeros(V, D).double()}, "expected float32, bfloat16 or float16"),
        ({"lk_weight": torch.zeros(N - 1)}, r"lk_weight has shape \[11\]"),
        ({"eta": -1.0}, "eta -1.0 must be at least 0"),
        ({"chunk": 0}, "chunk 0 must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_loss(**{**case(), **change})
