"""What a user is told of an error in another process is what it said there."""

from __future__ import annotations

import traceback

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException

from pipeline.actors import telling
from pipeline.corpus.rows import TemplateError
from pipeline.errors import ConfigError, DraftlineError, user_error

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


def raised(by: Exception) -> RayTaskError:
    """What Ray raises in the driver for an error in a function of Ray Data."""
    try:
        try:
            raise by
        except Exception as e:
            raise UserCodeException("UDF failed to process a data block.") from e
    except UserCodeException as e:
        error = RayTaskError("MapBatches", traceback.format_exc(), e, "ray::MapBatches", 1, "::1")
        return error.as_instanceof_cause()


def test_what_ray_wraps_is_one_error() -> None:
    with pytest.raises(DraftlineError, match=r"^engine\.kv_gib=1: too small\.$"), telling("It died", "Use less."):
        raise raised(ConfigError("engine.kv_gib=1: too small."))
    with (
        pytest.raises(DraftlineError, match=r"^It died 4 times \(the last: .*\)\. Use less\.$"),
        telling("It died", "Use less."),
    ):
        raise ActorDiedError()
    with pytest.raises(UserCodeException), telling("It died", "Use less."):
        raise raised(ValueError("a defect keeps its trace"))
