"""The feature store: what the target saw at every token of the corpus, kept in shards.

A features artifact holds `shard-00000.safetensors`, ... Each holds the rows of one stretch of the corpus, end to end:

    taps bf16[sumS, L*D]  last_hidden bf16[sumS, D]  input_ids int32[sumS]  loss_mask uint8[sumS]  offsets int64[rows+1]

with the rows' sample ids as JSON in the safetensors metadata (`sample_ids`).

Shape letters: S tokens of a row, L taps, D hidden size.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import artifact
from pipeline.errors import ArtifactError
from pipeline.identity import differing

_SAMPLE_IDS = "sample_ids"
_THREADS = 2  # that verify ahead: hashing leaves the interpreter to the training step


@dataclasses.dataclass(frozen=True)
class FeatureRow:
    """One row of training data.

    Attributes:
        sample_id: of the corpus row (`TokenRow.sample_id`).
        input_ids: int64[S].
        loss_mask: bool[S], true where the assistant speaks.
        taps: bf16[S, L*D], raw outputs of the tapped layers in the order of target_layer_ids.
        last_hidden: bf16[S, D], after the target's final norm.
    """

    sample_id: str
    input_ids: Tensor
    loss_mask: Tensor
    taps: Tensor
    last_hidden: Tensor


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, rows: Sequence[FeatureRow], tap_width: int, hidden_size: int) -> None:
    """Writes a shard aside and renames it, so that `path` is a whole shard or isn't there.

    Args:
        tap_width, hidden_size: L*D and D, for a shard without rows.
    """
    offsets = list(itertools.accumulate((len(r.input_ids) for r in rows), initial=0))
    tensors = {
        "taps": torch.cat([r.taps for r in rows]) if rows else torch.empty(0, tap_width, dtype=torch.bfloat16),
        "last_hidden": (
            torch.cat([r.last_hidden for r in rows]) if rows else torch.empty(0, hidden_size, dtype=torch.bfloat16)
        ),
        "input_ids": torch.cat([r.input_ids for r in rows] or [torch.empty(0)]).to(torch.int32),
        "loss_mask": torch.cat([r.loss_mask for r in rows] or [torch.empty(0)]).to(torch.uint8),
        "offsets": torch.tensor(offsets, dtype=torch.int64),
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, aside, metadata={_SAMPLE_IDS: json.dumps([r.sample_id for r in rows])})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class FeatureStore:
    """Random access to the rows of a features artifact, memory-mapped.

    Sizes are checked here, and each shard's SHA-256 once, before its first row is given: when that is read, or before
    it in the background, where it was said to be `expect`ed.

    Attributes:
        path: the artifact's directory.
        manifest: its manifest; info holds target_layer_ids, hidden_size and shards.
        rows: how many rows there are, in the order of the corpus.

    Raises:
        ArtifactError: there is no features artifact, or a shard is missing or truncated.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = artifact.load(self.path, "features", verify=False)
        self._names = [str(s["name"]) for s in self.manifest.info["shards"]]
        self._ends = list(itertools.accumulate(int(s["rows"]) for s in self.manifest.info["shards"]))
        self.rows = self._ends[-1] if self._ends else 0
        self._open: dict[int, Future[_Shard]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[FeatureRow]:
        return (self[i] for i in range(self.rows))

    def __getitem__(self, index: int) -> FeatureRow:
        """Row `index`, 0 to rows - 1.

        Its taps and last_hidden may share memory with the file's mapping: do not write to them.

        Raises:
            IndexError: no such row.
            ArtifactError: its shard was altered.
        """
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of a feature store with {self.rows} rows")
        number = bisect.bisect_right(self._ends, index)
        if number not in self._open:
            shard = self._verified(number)
            self._open[number] = Future()
            self._open[number].set_result(shard)
        return self._open[number].result().row(index - (self._ends[number - 1] if number else 0))

    def expect(self, indices: Iterable[int]) -> bool:
        """Has the shards of rows that will be read verified in the background, in this order; a row whose shard's turn
        has not come waits for it, and a damaged shard is said where its first row is read.

        Returns:
            Whether there are shards with rows that nobody has asked for yet.
        """
        for index in indices:
            number = bisect.bisect_right(self._ends, index)
            if number not in self._open:
                self._threads = self._threads or ThreadPoolExecutor(_THREADS, "draftline-verify")
                self._open[number] = self._threads.submit(self._verified, number)
        return len(self._open) < len({end for end in self._ends if end})

    def close(self) -> None:
        """Ends the verifying of shards that nobody will read."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        # Mappings don't travel between processes; the reader there opens (and verifies) its own.
        return {**self.__dict__, "_open": {}, "_threads": None}

    def _verified(self, number: int) -> _Shard:
        file = self.path / self._names[number]
        entry = self.manifest.files.get(file.name)
        remedy = "Delete the features and run jobs/extract.py again."
        if entry is None:
            raise ArtifactError(f"{file} is not listed in its manifest. {remedy}")
        try:
            digest = artifact.sha256_file(file)
        except OSError as e:
            raise ArtifactError(f"{file} cannot be read ({e.strerror}). {remedy}") from None
        if digest != entry["sha256"]:
            raise ArtifactError(
                f"{file} was altered: its SHA-256 is {digest[:12]}..., not {entry['sha256'][:12]}... {remedy}"
            )
        try:
            return _Shard(file)
        except (SafetensorError, KeyError, ValueError) as e:
            raise ArtifactError(f"{file} is not a feature shard this version can read ({e}). {remedy}") from None


class _Shard:
    """One mapped shard file."""

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt")
        self._sample_ids: list[str] = json.loads(self._file.metadata()[_SAMPLE_IDS])
        self._offsets: list[int] = self._file.get_tensor("offsets").tolist()
        self._tensors = {n: self._file.get_slice(n) for n in ("taps", "last_hidden", "input_ids", "loss_mask")}

    def row(self, index: int) -> FeatureRow:
        start, end = self._offsets[index], self._offsets[index + 1]
        return FeatureRow(
            sample_id=self._sample_ids[index],
            input_ids=self._tensors["input_ids"][start:end].long(),
            loss_mask=self._tensors["loss_mask"][start:end].bool(),
            taps=self._tensors["taps"][start:end],
            last_hidden=self._tensors["last_hidden"][start:end],
        )


_FIELDS = {
    "revision": "revision",
    "weight_digest": "weights",
    "config_digest": "config",
    "tokenizer_digest": "tokenizer",
}


def check_identity(manifest: artifact.Manifest, identity: Mapping[str, str], what: Path | str) -> None:
    """Refuses an artifact made with another target (`pipeline.identity.same_target`).

    Args:
        identity: `TargetIdentity.as_dict()` of the target in use.
        what: the artifact, as the message calls it.

    Raises:
        ArtifactError: names the first of revision, weights, config, tokenizer that differs, and what to do.
    """
    if manifest.target is None:
        raise ArtifactError(f"{what} does not say which target it was made with. Make the {manifest.kind} again.")
    for field in differing(manifest.target, identity):
        made, used = manifest.target.get(field), identity.get(field)
        raise ArtifactError(
            f"{what} belongs to another target: its {_FIELDS.get(field, field)} is {_short(made)}, the configured "
            f"target's is {_short(used)}. Set target.path and target.revision to those it was made with, or make the "
            f"{manifest.kind} again with this target."
        )


def _short(value: str | None) -> str:
    return repr(value) if value is None or len(value) < 64 else f"{value[:12]}..."
