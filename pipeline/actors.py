"""What the stages that map work over Ray Data's actors share: how often, on which GPUs, and how a failure is told.

Ray is imported when it is used: the rooms whose edge this is are read without it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.errors import DraftlineError, user_error

if TYPE_CHECKING:
    from pipeline.config import TargetConfig

TRIES = 4  # of a piece of work whose actor dies: more would be a piece that kills it


def num_gpus(target: TargetConfig, each: int = 1) -> float | None:
    """GPUs that an actor with the target takes: `each`, None on CPU. Raises DraftlineError where too few are there."""
    import ray

    if target.device == "cpu":
        return None
    there = ray.cluster_resources().get("GPU", 0)
    if there < each:
        raise DraftlineError(
            f"target.device={target.device!r} for actors of {each} GPU, but the Ray "
            f"cluster has {there:g} GPUs. Use target.device=cpu, or a cluster that has them."
        )
    return float(each)


def over_actors(
    items: list[dict[str, Any]], actor: type, given: tuple[Any, ...], *, actors: int, gpus: float | None
) -> Iterator[dict[str, Any]]:
    """What actors make of items, as it comes: Ray Data restarts an actor that died and gives its item out again.

    Args:
        items: plain columns; one item is a batch of its own. actor: a class that maps such batches, made with `given`.
        actors: how many at most. gpus: of each, as `num_gpus` gives it.
    """
    import ray

    with warnings.catch_warnings():
        # Ray 2.60 calls max_task_retries deprecated here and has no other name for it.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            actor,
            batch_size=1,
            num_cpus=1,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
            max_task_retries=TRIES - 1,
            fn_constructor_args=given,
        )
    return iter(made.iter_rows())


@contextlib.contextmanager
def telling(died: str, advice: str) -> Iterator[None]:
    """Turns what Ray raises in the block into one error that a user can act on, where it is one.

    Args:
        died: what an actor that died did, to be followed by `TRIES`. advice: what to do about it.

    Raises:
        DraftlineError: a DraftlineError of an actor (Ray Data wraps it twice and keeps its text), or an actor that
            died again and again. Any other failure of an actor's stays what it is.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayError as e:
        if (said := user_error(str(e))) is not None:
            raise DraftlineError(said) from None
        if isinstance(e, ray.exceptions.RayActorError):
            last = " ".join(str(e).split())[:300]
            raise DraftlineError(f"{died} {TRIES} times (the last: {last}). {advice}") from None
        raise
