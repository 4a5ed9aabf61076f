"""Pearson's chi-square test of counts against exact probabilities."""

from __future__ import annotations

import torch
from scipy.stats import chisquare


def p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """P(a chi-square at least as large) of counts int[C] drawn from probability float64[C].

    Categories expected fewer than 5 times are pooled into one. A count where the probability is 0 gives 0.
    """
    counts, probability = counts.double(), probability.double()
    if bool((counts[probability <= 0] > 0).any()):
        return 0.0
    counts, probability = counts[probability > 0], probability[probability > 0]
    expected = probability / probability.sum() * counts.sum()
    rare = expected < 5
    if int(rare.sum()) > 1:
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)
