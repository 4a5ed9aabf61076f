"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DraftlineError(Exception):
    """A problem the user can mend: says what was wrong, with the value, and what to do.

    Jobs print the message alone (no stack trace) and exit with status 2; anything else that is
    raised is a defect of draftline and keeps its trace.
    """


class ArtifactError(DraftlineError):
    """An artifact is missing, truncated, altered, of another kind, or made from other inputs."""


class UnknownVersion(DraftlineError):
    """A registered model has no version of that number or alias."""


class ConfigError(DraftlineError):
    """A configuration key or value is unknown or ill-typed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
