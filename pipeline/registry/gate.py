"""The gate: may this draft become champion? A pure function of two reports and a policy.

    decision = decide(candidate_report, champion_report, config.gate)
    print(decision.table())
    decision.require()        # raises PromotionRefused when the verdict is "refuse"

Speed is compared by intervals, never by point estimates. The ratio of two speedups that were measured apart gets the
interval whose logarithmic half-widths add in quadrature, sqrt(wa^2 + wb^2): what two independent measurements allow.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

from pipeline.errors import DraftlineError

Verdict = Literal["promote", "refuse"]


class PromotionRefused(DraftlineError):
    """The gate refused a challenger; the message holds every check with its number."""


class GatePolicy(Protocol):
    """What a draft must show (`pipeline.config.GateConfig`).

    Attributes:
        require_exact_greedy: greedy output equals plain decoding's, token for token.
        min_speedup_low: the lower bound of the speedup must be above this.
        max_regression: most of the champion's speedup that may be lost, as a fraction (0.05: 5 %).
        min_tau: least acceptance length (0: no floor).
    """

    @property
    def require_exact_greedy(self) -> bool: ...
    @property
    def min_speedup_low(self) -> float: ...
    @property
    def max_regression(self) -> float: ...
    @property
    def min_tau(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Check:
    """One reason of a verdict: what was measured, the bound it had to meet, and whether it did."""

    name: str
    value: float | bool | str
    bound: str
    passed: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class GateDecision:
    """A verdict with every number that led to it."""

    verdict: Verdict
    reasons: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        return self.verdict == "promote"

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that refused it."""
        return tuple(c for c in self.reasons if not c.passed)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form: {"verdict": str, "reasons": [{check, value, bound, passed, detail}]}."""
        reasons = [
            {"check": c.name, "value": c.value, "bound": c.bound, "passed": c.passed, "detail": c.detail}
            for c in self.reasons
        ]
        return {"verdict": self.verdict, "reasons": reasons}

    def table(self) -> str:
        """The verdict as a text table, one line a check."""
        rows = [("check", "value", "must be", "", "")]
        rows += [(c.name, _show(c.value), c.bound, "ok" if c.passed else "FAILED", c.detail) for c in self.reasons]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join([f"verdict: {self.verdict}", *(line.rstrip() for line in lines)])

    def require(self) -> None:
        """Raises PromotionRefused unless the verdict is to promote."""
        if not self.promoted:
            names = ", ".join(c.name for c in self.failed)
            raise PromotionRefused(
                f"The gate refused the challenger ({names}). The champion stays as it was.\n{self.table()}\n"
                "Train a better draft, or change the gate's settings (gate.*) if its bounds are not yours."
            )


def decide(candidate: dict[str, Any], champion: dict[str, Any] | None, policy: GatePolicy) -> GateDecision:
    """Decides whether a candidate may replace the champion.

    Args:
        candidate, champion: `report.json` of the drafts (pipeline/evaluation); None when there is no champion yet.
            Read here: exact_greedy, headline.{speedup, speedup_low, speedup_high, tau}, target, evaluation_set_digest.
        policy: the bounds.
    Raises:
        DraftlineError: a report lacks one of these fields, or holds something that is not a number.
    """
    headline = _Headline.of(candidate, "candidate")
    checks = [
        Check("exact_greedy", _exact(candidate), "true" if policy.require_exact_greedy else "any",
              _exact(candidate) or not policy.require_exact_greedy,
              "" if _exact(candidate) else "greedy output differs from plain decoding"),
        Check("speedup_low", headline.low, f"> {policy.min_speedup_low:g}", headline.low > policy.min_speedup_low,
              f"speedup {headline.text()} against plain decoding"),
    ]  # fmt: skip
    if policy.min_tau > 0:
        checks.append(Check("tau", headline.tau, f">= {policy.min_tau:g}", headline.tau >= policy.min_tau))
    if champion is not None:
        checks += _against(candidate, headline, champion, policy)
    passed = all(c.passed for c in checks)
    return GateDecision("promote" if passed else "refuse", tuple(checks))


def _against(
    candidate: dict[str, Any], headline: _Headline, champion: dict[str, Any], policy: GatePolicy
) -> list[Check]:
    checks = []
    ours, theirs = _field(candidate, "target", "candidate"), _field(champion, "target", "champion")
    for part in sorted({*ours, *theirs}):
        same = ours.get(part) == theirs.get(part)
        detail = "" if same else f"the champion's target has {_short(theirs.get(part))}; use another model name"
        checks.append(Check(f"target.{part}", _short(ours.get(part)), "as champion's", same, detail))
    digests = [_field(r, "evaluation_set_digest", who) for r, who in ((candidate, "candidate"), (champion, "champion"))]
    same = digests[0] == digests[1]
    detail = "" if same else f"the champion was measured on {_short(digests[1])}; measure both on one set"
    checks.append(Check("evaluation_set", _short(digests[0]), "as champion's", same, detail))
    other = _Headline.of(champion, "champion")
    ratio, low, high = _ratio(headline, other)
    bound = 1.0 - policy.max_regression
    checks.append(
        Check("speedup_ratio_low", low, f">= {bound:g}", low >= bound,
              f"{headline.text()} over the champion's {other.text()} is {ratio:.3f} [{low:.3f}, {high:.3f}]")
    )  # fmt: skip
    return checks


@dataclasses.dataclass(frozen=True)
class _Headline:
    speedup: float
    low: float
    high: float
    tau: float

    @classmethod
    def of(cls, report: dict[str, Any], who: str) -> _Headline:
        block = _field(report, "headline", who)
        values = []
        for name in ("speedup", "speedup_low", "speedup_high", "tau"):
            value = _field(block, name, who, "headline.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DraftlineError(f"The {who}'s report has headline.{name}={value!r}; it must be a number.")
            values.append(float(value))
        return cls(*values)

    def text(self) -> str:
        return f"{self.speedup:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _ratio(ours: _Headline, theirs: _Headline) -> tuple[float, float, float]:
    """Ratio of two speedups and its interval; NaN, which fails every bound, when an interval isn't positive."""
    if not all(math.isfinite(x) and x > 0 for h in (ours, theirs) for x in (h.speedup, h.low, h.high)):
        return math.nan, math.nan, math.nan
    down = math.hypot(math.log(ours.speedup / ours.low), math.log(theirs.high / theirs.speedup))
    up = math.hypot(math.log(ours.high / ours.speedup), math.log(theirs.speedup / theirs.low))
    ratio = ours.speedup / theirs.speedup
    return ratio, ratio * math.exp(-down), ratio * math.exp(up)


def _exact(report: dict[str, Any]) -> bool:
    return _field(report, "exact_greedy", "candidate") is True


def _field(report: dict[str, Any], name: str, who: str, prefix: str = "") -> Any:
    if name not in report:
        raise DraftlineError(
            f"The {who}'s report has no field {prefix}{name}: make it again with this version's evaluate."
        )
    return report[name]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text


def _show(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
