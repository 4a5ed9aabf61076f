"""The gate: may this draft become champion? A pure function of a report, a comparison and a policy.

    decision = decide(report, config.gate, champion_target=target, comparison=comparison)
    print(decision.text())
    decision.require()        # raises PromotionRefused when the verdict is "refuse"

Speed is compared by intervals, never by point estimates, and with the champion only as the two drafts were measured
side by side (`compare_drafts` of pipeline/evaluation/stages.py): speeds of two days, machines or prompt sets are no
comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from pipeline.errors import DraftlineError
from pipeline.evaluation.checks import Check, table
from pipeline.identity import differing

_REMEDY = "Train a better draft, or change the gate's settings (gate.*) if its bounds are not yours."

Verdict = Literal["promote", "refuse"]


class PromotionRefused(DraftlineError):
    """The gate refused a challenger; the message holds every check with its number."""


class GatePolicy(Protocol):
    """What a draft must show (`pipeline.config.GateConfig`).

    Attributes:
        require_exact_greedy: greedy output equals plain decoding's, token for token.
        min_speedup_low: the lower bound of the speedup must be above this.
        min_prompts: least number of prompts that the speedup was measured on: fewer give intervals that mean little.
        max_regression: most of the champion's speed that may be lost, as a fraction (0.05: 5 %).
        min_tau: least acceptance length (0: no floor).
    """

    @property
    def require_exact_greedy(self) -> bool: ...
    @property
    def min_speedup_low(self) -> float: ...
    @property
    def min_prompts(self) -> int: ...
    @property
    def max_regression(self) -> float: ...
    @property
    def min_tau(self) -> float: ...


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
        return f"verdict: {self.verdict}\n{table(self.reasons)}"

    def text(self) -> str:
        """The table, and for a refusal what to do about it."""
        if self.promoted:
            return self.table()
        advice = list(dict.fromkeys(c.remedy or _REMEDY for c in self.failed))
        return "\n".join([self.table(), "The champion, if there is one, stays as it was.", *advice])

    def require(self) -> None:
        """Raises PromotionRefused unless the verdict is to promote."""
        if not self.promoted:
            names = ", ".join(c.name for c in self.failed)
            raise PromotionRefused(f"The gate refused the challenger ({names}).\n{self.text()}")


def decide(
    candidate: dict[str, Any],
    policy: GatePolicy,
    *,
    champion_target: Mapping[str, str] | None = None,
    comparison: dict[str, Any] | None = None,
) -> GateDecision:
    """Decides whether a candidate may become champion.

    Args:
        candidate: `report.json` of the draft (pipeline/evaluation). Read here: exact_greedy, target, draft_digest,
            headline.{speedup, speedup_low, speedup_high, tau, prompts}.
        policy: the bounds.
        champion_target: identity of the champion's target; None when there is no champion, or the candidate is it.
        comparison: `comparison.json` of candidate and champion, measured side by side; None likewise, or when the
            targets differ (which refuses by itself).
    Raises:
        DraftlineError: a report lacks one of these fields, holds something that is not a number, or the comparison is
            of another draft.
    """
    headline = _Headline.of(candidate)
    checks = [
        Check("exact_greedy", _exact(candidate), "true" if policy.require_exact_greedy else "any",
              _exact(candidate) or not policy.require_exact_greedy,
              "" if _exact(candidate) else "greedy output differs from plain decoding",
              "An output that differs is a fault of the engine or of its numerics: a draft can't cause it. Report it."),
        Check("prompts", headline.prompts, f">= {policy.min_prompts}", headline.prompts >= policy.min_prompts, "",
              f"Evaluate on more prompts: raise benchmark.prompts to {policy.min_prompts} or more (the corpus must "
              "hold out as many beside benchmark.calibrate_prompts)."),
        Check("speedup_low", headline.low, f"> {policy.min_speedup_low:g}", headline.low > policy.min_speedup_low,
              f"speedup {headline.text()} against plain decoding"),
    ]  # fmt: skip
    if policy.min_tau > 0:
        checks.append(Check("tau", headline.tau, f">= {policy.min_tau:g}", headline.tau >= policy.min_tau))
    if champion_target is not None:
        checks += _same_target(candidate, champion_target)
    if comparison is not None:
        checks += _over_champion(candidate, comparison, policy)
    passed = all(c.passed for c in checks)
    return GateDecision("promote" if passed else "refuse", tuple(checks))


def _same_target(candidate: dict[str, Any], champion: Mapping[str, str]) -> list[Check]:
    checks, ours = [], _field(candidate, "target")
    others = differing(ours, champion)
    for part in sorted({*ours, *champion} - {"id"}):
        same = part not in others
        detail = "" if same else f"the champion's target has {_short(champion.get(part))}"
        remedy = "A draft of another target needs a name of its own: set tracking.model_name."
        checks.append(Check(f"target.{part}", _short(ours.get(part)), "as champion's", same, detail, remedy))
    return checks


def _over_champion(candidate: dict[str, Any], comparison: dict[str, Any], policy: GatePolicy) -> list[Check]:
    measured = comparison["challenger"]["draft_digest"]
    if measured != _field(candidate, "draft_digest"):
        raise DraftlineError(
            f"The comparison measured the draft {_short(measured)}, not the challenger. Promote again."
        )
    ratio, low, high, prompts = (comparison[k] for k in ("ratio", "low", "high", "prompts"))
    bound = 1.0 - policy.max_regression
    remedy = ""
    if not low >= bound and high >= bound:
        loss = f"{policy.max_regression:.0%}"
        remedy = f"{prompts} prompts can't tell whether it loses over {loss}: raise benchmark.prompts, evaluate again."
    enough = "Promote again with benchmark.prompts set to as many."
    return [
        Check("compared_prompts", prompts, f">= {policy.min_prompts}", prompts >= policy.min_prompts, "", enough),
        Check(
            "over_champion_low", low, f">= {bound:g}", low >= bound,
            f"{ratio:.3f} [{low:.3f}, {high:.3f}] times the champion's tokens/s, side by side on {prompts} prompts",
            remedy,
        ),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Headline:
    speedup: float
    low: float
    high: float
    tau: float
    prompts: int

    @classmethod
    def of(cls, report: dict[str, Any]) -> _Headline:
        block = _field(report, "headline")
        values = []
        for name in ("speedup", "speedup_low", "speedup_high", "tau", "prompts"):
            value = _field(block, name, "headline.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DraftlineError(f"The report has headline.{name}={value!r}; it must be a number.")
            values.append(float(value))
        speedup, low, high, tau, prompts = values
        return cls(speedup, low, high, tau, int(prompts))

    def text(self) -> str:
        return f"{self.speedup:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _exact(report: dict[str, Any]) -> bool:
    return _field(report, "exact_greedy") is True


def _field(report: dict[str, Any], name: str, prefix: str = "") -> Any:
    if name not in report:
        raise DraftlineError(f"The report has no field {prefix}{name}: make it again with this version's evaluate.")
    return report[name]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
