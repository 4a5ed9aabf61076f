"""Which target something belongs to, and whether two are the same one; needs neither torch nor the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TargetIdentity:
    """Which target something belongs to.

    weight_digest: over the safetensors files; config_digest: over config.json, without what says only how it was
    written; tokenizer_digest: over the tokenizer's files and chat template; revision: the hub's commit, else the
    configured one, else the first 12 digits of the weight digest. id: as configured, or its directory's name.
    """

    id: str
    revision: str
    weight_digest: str
    config_digest: str
    tokenizer_digest: str

    def as_dict(self) -> dict[str, str]:
        """As manifests keep it."""
        return dataclasses.asdict(self)


def differing(made: Mapping[str, str] | None, used: Mapping[str, str] | None) -> list[str]:
    """The fields in which two identities (`TargetIdentity.as_dict()`; None: none) are of different targets.

    All count but the id, which says where a target lay: a copy of it elsewhere is the same target.
    """
    one, other = made or {}, used or {}
    fields = dict.fromkeys([*(f.name for f in dataclasses.fields(TargetIdentity)), *one, *other])
    return [f for f in fields if f != "id" and one.get(f) != other.get(f)]


def same_target(made: Mapping[str, str] | None, used: Mapping[str, str] | None) -> bool:
    """Whether two identities are of one target, wherever it lay."""
    return not differing(made, used)
