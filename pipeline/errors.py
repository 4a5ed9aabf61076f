"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


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


def user_error(*texts: str) -> str | None:
    """What a DraftlineError said that was raised in another process, of which only its trace's text came back.

    Args:
        texts: traces, as Ray puts them into the errors that it raises in the driver.

    Returns:
        The message of the last such error of the first text that has one; None where it was another failure.
    """
    # Not by module: a package's own kinds (a chat template's, a request's) are users' mistakes as well.
    prefixes = tuple(f"{kind.__module__}.{kind.__qualname__}: " for kind in _kinds(DraftlineError))
    for text in texts:
        for line in reversed(text.splitlines()):
            if line.startswith(prefixes):
                return line.split(": ", 1)[1]
    return None


def _kinds(kind: type[DraftlineError]) -> Iterator[type[DraftlineError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)
