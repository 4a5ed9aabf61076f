"""A draft registered and promoted as the jobs do it, and what an alias names then."""

from __future__ import annotations

from pathlib import Path

from pipeline.registry import promotion, registration
from tests.registry.reports import Policy, comparison, make_draft, make_report

NAME = "draftline-tiny-dspark"


def submit(recorder, folder: Path, weights: bytes, **numbers) -> str:
    draft = make_draft(folder / "draft", weights)
    make_report(folder / "report", draft, **numbers)
    with recorder.stage(recorder.parent("demo"), "register") as run:
        return registration.register(recorder, lambda: run, NAME, folder / "draft", folder / "report")


def promote(recorder, policy=None, ratio=1.0, version=None, meanwhile=lambda: None):
    """Promotes; challenger and champion measured side by side give `ratio`, to 1 %, and `meanwhile` happens."""

    def compare(challenger, champion):
        assert challenger.version != champion.version
        meanwhile()
        return comparison(ratio, ratio - 0.01, ratio + 0.01, draft=challenger.tags["draft_digest"])

    with recorder.stage(recorder.parent("demo"), "promote") as run:
        return promotion.promote(recorder, lambda: run, NAME, policy or Policy(), compare, version), run


def alias(recorder, which: str) -> str | None:
    version = recorder.client.get_registered_model(NAME).aliases.get(which)
    return None if version is None else str(version)
