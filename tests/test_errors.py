"""What a user is told of an error in another process is what it said there."""

from __future__ import annotations

from pipeline.corpus.rows import TemplateError
from pipeline.errors import user_error

TRACE = """ray::MapBatches() (pid=1)
pipeline.errors.ConfigError: engine.kv_gib=1: too small. Raise it.

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
"""


def test_the_last_user_error_of_the_first_trace_that_has_one() -> None:
    assert user_error("", TRACE) == "engine.kv_gib=1: too small. Raise it."
    assert user_error(f"{TRACE}pipeline.errors.DraftlineError: and more", TRACE) == "and more"
    assert user_error(f"{TemplateError.__module__}.TemplateError: no end of turn") == "no end of turn"


def test_other_failures_are_none() -> None:
    assert user_error("RuntimeError: x", "  pipeline.errors.ConfigError: quoted", "ValueError: Error: y") is None
    assert user_error() is None
