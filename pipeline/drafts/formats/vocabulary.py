"""A reduced vocabulary in the projects' files: `d2t` int64[Vd], offsets (target id = d + d2t[d]), and `t2d` bool[V].

Letters: V target vocabulary rows, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.errors import ArtifactError


def tensors_of(d2t: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """The two tensors of a draft vocabulary.

    Args:
        d2t: int64[Vd], ascending target ids. rows: V.
    """
    t2d = torch.zeros(rows, dtype=torch.bool)
    t2d[d2t.cpu()] = True
    return {"d2t": d2t.cpu() - torch.arange(len(d2t)), "t2d": t2d}


def read(path: Path, tensors: Mapping[str, torch.Tensor], size: int, rows: int) -> torch.Tensor:
    """int64[Vd]: target ids of the draft vocabulary, ascending.

    Raises:
        ArtifactError: the tensors are missing, contradict each other, or lead outside of the target's vocabulary.
    """
    problems = [f"{n} is missing" for n in ("d2t", "t2d") if n not in tensors]
    if not problems:
        offsets, t2d = tensors["d2t"], tensors["t2d"]
        problems += [
            f"{n} has shape {list(t.shape)}, the config gives [{want}]"
            for n, t, want in (("d2t", offsets, size), ("t2d", t2d, rows))
            if t.shape != (want,)
        ]
    if not problems:
        ids = torch.arange(size) + offsets.long()
        if len(outside := ids[(ids < 0) | (ids >= rows)]):
            problems.append(f"d2t leads to token {int(outside[0])}, the target has {rows}, from 0")
        elif bool((ids.diff() <= 0).any()):
            problems.append("d2t does not lead to ascending tokens")
        elif not torch.equal(t2d.bool().nonzero().flatten(), ids):
            problems.append("t2d marks other tokens than d2t leads to")
    if problems:
        raise ArtifactError(f"The draft at {path} has no vocabulary that fits: " + "; ".join(problems) + ".")
    return ids
