"""The numbers of a report, pure functions of what was observed.

Conventions, recorded beside the numbers: tau counts tokens per decoding step of the target with the bonus token;
acceptance rate is accepted / drafted tokens (what the schedule left out counts as drafted); speedup is a ratio of
decode tokens/s (first token excluded) per prompt, and the headline is its median over prompts with a
percentile-bootstrap 95 % interval over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONVENTIONS = {
    "answers": "end at an eos token of the target or the chat template's end of turn, as served chats do",
    "tau": "tokens emitted per decoding step of the target, bonus token included, prefill's token excluded",
    "accept_rate": "accepted / drafted tokens, those that the schedule did not verify among them",
    "verified_accept_rate": "accepted / verified draft tokens",
    "speedup": "median over prompts of the ratio of decode tokens/s to the `none` arm's on the same prompt",
    "totals": "ratio of all prompts' decode tokens/s together to the baseline arm's, same pairing",
    "interval": "95 %, percentile bootstrap over prompts",
}


def wilson(hits: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion; (0, 1) without tries."""
    if tries == 0:
        return 0.0, 1.0
    p, d = hits / tries, 1 + z * z / tries
    mid = (p + z * z / (2 * tries)) / d
    half = z * math.sqrt(p * (1 - p) / tries + z * z / (4 * tries * tries)) / d
    return max(0.0, mid - half), min(1.0, mid + half)


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray], float], draws: int, seed: int
) -> tuple[float, float, float]:
    """(value, low, high): a statistic with its percentile-bootstrap 95 % interval over resampled entries."""
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(data), (draws, len(data)))
    samples = np.array([statistic(data[i]) for i in picks])
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(statistic(data)), float(low), float(high)


def speedup(arm: Sequence[float], baseline: Sequence[float], draws: int, seed: int) -> dict[str, float]:
    """Paired speedup of an arm over the baseline: tokens/s per prompt, same prompts in the same order."""
    ratios = np.asarray(arm) / np.asarray(baseline)
    value, low, high = bootstrap(ratios.tolist(), lambda x: float(np.median(x)), draws, seed)
    return {"speedup": value, "low": low, "high": high}


def totals(
    tokens: Sequence[float],
    seconds: Sequence[float],
    base_tokens: Sequence[float],
    base_seconds: Sequence[float],
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Ratio of total decode tokens/s, arm over baseline; the bootstrap draws prompts with both arms' figures."""
    data = np.asarray([tokens, seconds, base_tokens, base_seconds], dtype=np.float64)

    def ratio(picked: np.ndarray) -> np.ndarray:
        t, s, bt, bs = picked.sum(-1)
        return (t / s) / (bt / bs)

    picks = np.random.default_rng(seed).integers(0, data.shape[1], (draws, data.shape[1]))
    low, high = np.percentile(ratio(data[:, picks]), [2.5, 97.5])
    return {"totals": float(ratio(data)), "totals_low": float(low), "totals_high": float(high)}


def positions(offered: Sequence[int], accepted: Sequence[int]) -> list[dict[str, float]]:
    """Per position: conditional acceptance with its interval, and the survival it implies."""
    out, survival = [], 1.0
    for k, (n, a) in enumerate(zip(offered, accepted, strict=True), start=1):
        low, high = wilson(a, n)
        survival *= a / n if n else 0.0
        entry = {"position": k, "offered": n, "accepted": a, "acceptance": a / n if n else 0.0}
        out.append({**entry, "low": low, "high": high, "survival": survival})
    return out


def ece(predicted: np.ndarray, observed: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of probabilities [N] against outcomes [N], over equal-width bins."""
    if len(predicted) == 0:
        return 0.0
    where = np.minimum((predicted * bins).astype(int), bins - 1)
    gap = 0.0
    for b in range(bins):
        inside = where == b
        if inside.any():
            gap += inside.sum() * abs(predicted[inside].mean() - observed[inside].mean())
    return float(gap / len(predicted))


def reliability(predicted: np.ndarray, observed: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Bins of (mean prediction, observed share, count) for a reliability plot."""
    where = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        {
            "predicted": float(predicted[where == b].mean()),
            "observed": float(observed[where == b].mean()),
            "count": int((where == b).sum()),
        }
        for b in range(bins)
        if (where == b).any()
    ]


def auc(score: np.ndarray, observed: np.ndarray) -> float | None:
    """Area under the ROC curve (ties count half); None when only one outcome occurs."""
    positive, negative = score[observed == 1], score[observed == 0]
    if len(positive) == 0 or len(negative) == 0:
        return None
    wins = (positive[:, None] > negative[None]).mean() + 0.5 * (positive[:, None] == negative[None]).mean()
    return float(wins)


def summed(lists: Sequence[Sequence[int]]) -> list[int]:
    """Element-wise sum of lists of different lengths."""
    out = [0] * max((len(x) for x in lists), default=0)
    for x in lists:
        for i, v in enumerate(x):
            out[i] += v
    return out


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats of a nested structure, rounded for reading."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return value
