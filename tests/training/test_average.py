"""The running average of the weights: its value, its sharding, and its way through checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.training.average import Average, read_average


def _run(module: nn.Module, averages: list[Average], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.empty_like(p).normal_(generator=generator))
        for average in averages:
            average.update()


def test_three_ranks_hold_the_average_once_and_two_go_on_with_it(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    ranks = [Average(module.named_parameters(), 0.75, r, 3, gather=False) for r in range(3)]
    whole = Average(module.named_parameters(), 0.75, 0, 1, gather=False)
    _run(module, [*ranks, whole], 3, seed=0)
    for average in ranks:
        average.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert set(read_average(tmp_path)) == {n for n, _ in module.named_parameters()}

    fewer = [Average(module.named_parameters(), 0.75, r, 2, gather=False) for r in range(2)]
    for average in fewer:
        average.load(tmp_path)
    _run(module, [*fewer, whole], 2, seed=1)
    for name, folder, averages in (("fewer", tmp_path / "fewer", fewer), ("whole", tmp_path / "whole", [whole])):
        folder.mkdir()
        for average in averages:
            average.save(folder)
        assert name
    mine, theirs = read_average(tmp_path / "fewer"), read_average(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_the_average_is_the_formula(tmp_path: Path) -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    average = Average(module.named_parameters(), 0.9, 0, 1, gather=False)
    value = None
    for weight in (1.0, 2.0, 4.0):
        with torch.no_grad():
            module.weight.fill_(weight)
        average.update()
        value = weight if value is None else 0.9 * value + 0.1 * weight
    average.save(tmp_path)
    got = read_average(tmp_path)["weight"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([[value]]))
