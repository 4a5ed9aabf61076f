"""Attention over pages against the plain formula, whatever order the pages are in; nobody else's cells are read."""

from __future__ import annotations

import pytest
import torch

from pipeline.decoding import attention
from pipeline.decoding.attention import Segment, StepLayout
from pipeline.decoding.cache import PagedKV
from pipeline.decoding.geometry import LayerAttention

SIZE = 4
TABLES = {
    "one run": [list(range(3, 15)), list(range(20, 32)), [40, 41, 42]],
    "alike": [list(range(20, 32)), list(range(45, 58)), list(range(3, 15))],
    "several runs": [[3, 4, 5, 6, 20, 21, 22, 23, 10, 11, 12, 13], [30, 31, 32, 33, 34, 0, 1, 50, 51, 52, 53, 54], [9]],
    "no order": [[9, 3, 30, 4, 25, 1, 26, 12, 5, 17, 2, 40], [50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 11, 10], [33, 7]],
}
GEOMETRY = {
    "plain": LayerAttention(6, 2, 8, 8, 8**-0.5, 0, 0.0, 0),
    "window": LayerAttention(6, 2, 8, 8, 0.7, 6, 0.0, 0),
    "softcap": LayerAttention(4, 4, 8, 8, 0.5, 0, 0.7, 0),
    "other values": LayerAttention(6, 3, 8, 5, 0.4, 9, 0.0, 0),
}


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: LayerAttention, start: int, causal: bool
) -> torch.Tensor:
    """[n, H, d of v] of q [H, n, d] at positions from `start` over k, v [Hkv, N, d], in float64."""
    count, positions = q.shape[1], k.shape[1]
    scores = (q.double() @ k.double().repeat_interleave(a.groups, 0).transpose(1, 2)) * a.scale
    if a.softcap:
        scores = torch.tanh(scores / a.softcap) * a.softcap
    for i in range(count):
        for p in range(positions):
            near = not a.window or p > start + i - a.window
            if not (p <= start + i and near if causal else p >= start or near):
                scores[:, i, p] = -torch.inf
    return (scores.softmax(-1) @ v.double().repeat_interleave(a.groups, 0)).transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 1, 3), (40, 4, 2)])
@pytest.mark.parametrize("kind", GEOMETRY)
@pytest.mark.parametrize("order", TABLES)
def test_it_is_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, order: str, kind: str, counts: tuple[int, ...], causal: bool
) -> None:
    monkeypatch.setattr(attention, "ALONE", 2 * SIZE)
    a = GEOMETRY[kind]
    cache = PagedKV([(a.kv_heads, a.key_dim, a.value_dim)], 60, SIZE, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(len(order) + sum(counts))
    for tensor in (cache.k[0], cache.v[0]):  # what others left
        tensor.normal_(generator=generator)
    segments, keys, values = [], [], []
    for pages, count in zip(TABLES[order], counts, strict=True):
        start = len(pages) * SIZE - count - 1
        k, v = (torch.randn(a.kv_heads, start + count, dim, generator=generator) for dim in (a.key_dim, a.value_dim))
        cells = torch.tensor([pages[p // SIZE] * SIZE + p % SIZE for p in range(start)], dtype=torch.int64)
        cache.write(0, cells, k[:, :start], v[:, :start])
        segments.append(Segment(pages, start, count))
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(counts), a.heads, a.key_dim, generator=generator).transpose(0, 1)
    new = [torch.cat([x[:, s.start :] for x, s in zip(xs, segments, strict=True)], 1) for xs in (keys, values)]

    layout = StepLayout(segments, cache, [a], causal=causal)
    found = layout.attend(0, q, *new)

    # What runs on CUDA, here by its reference.
    torch.testing.assert_close(layout.by_kernel(a, q), found, rtol=1e-5, atol=1e-5)
    if counts == (1, 1, 1):
        moved = layout.behind()
        again = StepLayout([Segment(s.pages, s.start + 1, 1) for s in segments], cache, [a], causal=causal)
        assert torch.equal(moved.positions, again.positions) and torch.equal(moved.cells, again.cells)
        assert torch.equal(moved.by_kernel(a, q), again.by_kernel(a, q))
    at = 0
    for s, k, v in zip(segments, keys, values, strict=True):
        wanted = plain(q[:, at : at + s.count], k, v, a, s.start, causal)
        torch.testing.assert_close(found[at : at + s.count].double(), wanted, rtol=1e-5, atol=1e-5)
        assert layout.positions[at : at + s.count].tolist() == list(range(s.start, s.start + s.count))
        at += s.count
    ((made, pairs),) = layout._seen.values()
    if order == "alike":
        assert len(pairs) == 1, "the third is alone, or all but it are reading prompts"
    elif order == "no order":
        assert not pairs
    if order != "several runs":
        assert any(len(p.runs) > 1 for parts in made for p in parts) == (order == "no order")
    assert any(len(parts) > 1 for parts in made) == (order == "several runs" and kind == "plain")
