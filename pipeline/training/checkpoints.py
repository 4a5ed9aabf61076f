"""Training checkpoints: what a folder holds, how a run goes on from it, and the weights that come out of it.

    step_000100/   deepspeed/                          every rank's shard of fp32 weights and optimizer moments
                   average-rank-0.safetensors, ...     the running average, if there is one
                   meta.json                           {"step", "world", "zero_stage", "survival", "counts"}

Ray Train merges what the ranks wrote and keeps a checkpoint only when all of it has arrived. The same number of ranks
reads its own shards back, bit for bit; another number reads them through DeepSpeed's universal format, made on the way.
The borrowed matrices are buffers outside the state dict: in no checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.artifact import digest_json, write_json
from pipeline.errors import ArtifactError
from pipeline.training.average import Average, read_average

TAG = "deepspeed"
_UNIVERSAL = "universal"
_META = "meta.json"


def save(
    engine: Any,
    average: Average | None,
    *,
    run: str,
    step: int,
    rank: int,
    world: int,
    stage: int,
    survival: list[float],
    counts: dict[str, float],
) -> str:
    """Writes this rank's part of a checkpoint into a new folder of this machine, for `ray.train.report`; every rank
    calls it.

    Args:
        run: names the run in the machine's temporary folder (see `clear`).
        survival: the state of learned position weights, the same on all ranks (empty: fixed ones).
        counts: what was counted since the run began, over all ranks.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"draftline-{run}-checkpoint-"))
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"step": step})
    # DeepSpeed puts its own tools beside its files; one copy per checkpoint is of no use to anybody.
    for tool in ("zero_to_fp32.py", "zero_to_torch.py"):
        (folder / tool).unlink(missing_ok=True)
    if average is not None:
        average.save(folder)
    if rank == 0:
        meta = {"step": step, "world": world, "zero_stage": stage, "survival": survival, "counts": counts}
        write_json(folder / _META, meta)
    return str(folder)


def clear(run: str) -> None:
    """Removes what workers of this run that were killed left in the machine's temporary folder. One rank of a machine
    calls it, before any of them saves or opens a checkpoint."""
    for stale in Path(tempfile.gettempdir()).glob(f"draftline-{run}-*"):
        shutil.rmtree(stale, ignore_errors=True)


def discard(storage: Path, after: int) -> None:
    """Removes checkpoints of later steps than the one that a run goes on from: their ranks did not all arrive, and Ray
    Train would add the next ones to them. One rank calls it, before any of them saves."""
    for folder in storage.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > after:
            shutil.rmtree(folder, ignore_errors=True)


def name_of(step: int) -> str:
    """The folder of a step's checkpoint, in the run's storage."""
    return f"step_{step:06d}"


@contextlib.contextmanager
def opened(checkpoint: Any, *, run: str, world: int, local_rank: int) -> Iterator[Resume | None]:
    """The checkpoint that a run goes on from, ready to be loaded by `world` ranks; None for a new run.

    Where the checkpoint's number of ranks is another, one rank of each machine converts it, in the machine's temporary
    folder, which is removed when the block ends. Every rank enters and leaves the block.
    """
    import torch.distributed as dist

    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as place:
        folder = Path(place)
        meta = json.loads((folder / _META).read_text())
        if meta["world"] == world:
            yield Resume(folder, folder, TAG, meta)
            return
        # The same name for all ranks of a machine.
        key = digest_json([str(checkpoint.path), world])[:16]
        converted = Path(tempfile.gettempdir()) / f"draftline-{run}-universal-{key}"
        if local_rank == 0:
            shutil.rmtree(converted, ignore_errors=True)
            convert(folder / TAG, converted / _UNIVERSAL)
        dist.barrier()
        try:
            yield Resume(folder, converted, _UNIVERSAL, meta)
            dist.barrier()
        finally:
            if local_rank == 0:
                shutil.rmtree(converted, ignore_errors=True)


class Resume:
    """A checkpoint to load.

    Attributes:
        universal: whether the engine must be made with `checkpoint.load_universal`.
        step: steps done. world: ranks that wrote it. survival, counts: as `save` was given them.
    """

    def __init__(self, folder: Path, shards: Path, tag: str, meta: dict[str, Any]) -> None:
        self._folder, self._shards, self._tag = folder, shards, tag
        self.universal = tag == _UNIVERSAL
        self.step, self.world = int(meta["step"]), int(meta["world"])
        self.survival: list[float] = meta["survival"]
        self.counts: dict[str, float] = meta.get("counts", {})

    def load(self, engine: Any, average: Average | None) -> None:
        """Puts weights, moments and average back; every rank calls it.

        Raises:
            ArtifactError: the shards are not all there.
        """
        path, _ = engine.load_checkpoint(str(self._shards), tag=self._tag)
        if path is None:
            raise ArtifactError(
                f"The training checkpoint {self._folder} is incomplete, and Ray Train can't go back to the one before "
                f"it. Delete {self._folder.parent} to train from the start."
            )
        if average is not None:
            average.load(self._folder)


def convert(shards: Path, out: Path) -> None:
    """DeepSpeed's universal form of a checkpoint: one folder per parameter with its whole fp32 weight and moments."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(out),
        num_extract_workers=1,  # in this process: more would fork a worker of Ray's
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what only Megatron's pipelines write
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(options)


def weights(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint publishes, float32 by parameter name: the running average, else the fp32 weights."""
    averaged = read_average(folder)
    if averaged:
        return averaged
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return state
