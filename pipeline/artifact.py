"""Artifacts: directories that state what they hold, how they were made, and prove it.

Every stage's output is one directory with a `manifest.json` (design.md, rule 3). It is written beside its
final name and renamed whole, so a reader sees all of it or nothing; readers check sizes and digests.

    with create(path, kind="corpus", inputs={...}, config={...}) as staging:
        ...write files under staging.path...
        staging.counts["rows"] = n
    manifest = load(path, kind="corpus")

An interrupted stage keeps its staging directory when it asks for `resumable=True`; the next `create` with the
same inputs and config continues in it, and one with others starts empty.

A writer holds a lock on `.<name>.writer` beside the artifact, which the system takes from a process that dies. A second
writer is refused while the first one works, whatever it wants to write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import ArtifactError
from pipeline.identity import same_target
from pipeline.lock import lock

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_KEY = ".staging.json"
_SOURCES = (".py", ".yaml", ".json", ".jinja")
_PATIENCE = 1.0
"""Seconds to wait for a lock: a check by another job holds it for a moment, a writer for as long as it works."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a file so that a reader sees the old content or the new, never a part."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # half of it, where a disk is full
        raise


@functools.cache
def code_version() -> str:
    """Which code this is: `<version>+g<commit>[.dirty]` in a checkout, elsewhere `<version>+src.<digest>`.

    A job's uploaded working directory has no `.git`. `DRAFTLINE_CODE_VERSION` overrides both: a submitter that knows
    its commit passes it on (`infra/local/demo.py` does).
    """
    if given := os.environ.get("DRAFTLINE_CODE_VERSION"):
        return given
    root = Path(__file__).resolve().parent.parent
    try:
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True, timeout=10)
        # A copy within somebody's repository (an environment, a scratch folder) is not that repository's commit.
        if Path(run(["git", "rev-parse", "--show-toplevel"]).stdout.strip()) == root:
            sha = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
            dirty = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
            return f"{__version__}+g{sha}" + (".dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return f"{__version__}+src.{source_digest(root)[:12]}"


def source_digest(root: Path) -> str:
    """Hex SHA-256 over the source files of a draftline tree: of the same commit it is the same wherever it lies.

    Args:
        root: a checkout or a copy of one (pipeline/, kernels/, conf/, jobs/), or the directory that the package is
            installed in, where other folders are not draftline's.
    """
    own = ("pipeline", "kernels", "conf", "jobs") if (root / "conf").is_dir() else ("pipeline", "draftline_kernels")
    files = (p for folder in own for p in (root / folder).rglob("*") if p.suffix in _SOURCES and p.is_file())
    return digest_json({p.relative_to(root).as_posix(): sha256_file(p) for p in files})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        kind: `target`, `corpus`, `features`, `draft`, `report`, ...
        files: relative path -> {"sha256": hex, "bytes": int}, every file but the manifest.
        counts: rows, tokens, shards, ... of its content.
        config: the plain config of the stage that made it.
        inputs: name -> digest of each input artifact.
        target: identity of the target it belongs to, if any (see `pipeline.identity.TargetIdentity`).
        info: anything else worth keeping (tables, metrics), not part of the identity.
        code_version, created: who wrote it and when (not part of the identity).
    """

    kind: str
    files: dict[str, dict[str, Any]]
    counts: dict[str, int]
    config: dict[str, Any]
    inputs: dict[str, str]
    target: dict[str, str] | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    code_version: str = ""
    created: str = ""
    schema_version: int = SCHEMA_VERSION

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 over content and provenance: kind, file digests, config, inputs, target."""
        return digest_json(
            {
                "kind": self.kind,
                "files": {name: f["sha256"] for name, f in self.files.items()},
                "config": self.config,
                "inputs": self.inputs,
                "target": self.target,
            }
        )


@dataclasses.dataclass
class Staging:
    """A directory being written; what is put in `counts`, `info`, `target` goes into the manifest."""

    path: Path
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    target: dict[str, str] | None = None


@contextlib.contextmanager
def create(
    final: Path | str,
    kind: str,
    *,
    config: dict[str, Any],
    inputs: dict[str, str] | None = None,
    target: dict[str, str] | None = None,
    resumable: bool = False,
) -> Iterator[Staging]:
    """Writes an artifact aside and renames it to `final` when the block ends without an error.

    Args:
        final: directory that will hold the artifact; an older artifact there is replaced whole.
        resumable: keep what was staged if the block fails, and find it again next time.
    Raises:
        ArtifactError: somebody else is writing it; what is there and what is staged stays as it is.
    """
    final = Path(final).absolute()
    with _writing(final):
        yield from _create(final, kind, config, inputs or {}, target, resumable)


def _create(
    final: Path,
    kind: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    target: dict[str, str] | None,
    resumable: bool,
) -> Iterator[Staging]:
    key = digest_json({"kind": kind, "config": config, "inputs": inputs, "target": target})
    _settle(final)
    aside, _ = _beside(final)
    if aside.exists() and (not resumable or _staged_key(aside) != key):
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    write_json(aside / _KEY, {"key": key})
    staging = Staging(aside, target=target)
    try:
        yield staging
    except BaseException:
        if not resumable:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    files = {
        str(p.relative_to(aside)): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
        for p in sorted(aside.rglob("*"))
        if p.is_file() and p != aside / _KEY and p != aside / MANIFEST
    }
    manifest = Manifest(
        kind=kind,
        files=files,
        counts=staging.counts,
        config=config,
        inputs=inputs,
        target=staging.target,
        info=staging.info,
        code_version=code_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_json(aside / MANIFEST, dataclasses.asdict(manifest))
    # Only now: hashing takes a while, and a kill during it must not cost what was staged.
    (aside / _KEY).unlink()
    _replace(aside, final)


def load(path: Path | str, kind: str, *, verify: bool = True) -> Manifest:
    """Reads and checks an artifact's manifest.

    Args:
        verify: also hash every file (otherwise only sizes are checked).

    Raises:
        ArtifactError: missing, of another kind or schema, or a file is missing, truncated or altered.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"No {kind} artifact at {path}: {MANIFEST} is missing. Run the stage that makes it.")
    try:
        raw = json.loads(file.read_text())
        manifest = Manifest(**raw)
    except (ValueError, TypeError) as e:
        raise ArtifactError(f"{file} is not a manifest this version can read ({e}). Make the artifact again.") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}. "
            "Make the artifact again."
        )
    if manifest.kind != kind:
        raise ArtifactError(f"{path} holds a {manifest.kind!r} artifact where a {kind!r} was expected.")
    for name, entry in manifest.files.items():
        part = path / name
        if not part.is_file():
            raise ArtifactError(f"{part} is missing from the {kind} artifact. Make the artifact again.")
        if part.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{part} is truncated or altered: {part.stat().st_size} bytes, the manifest says {entry['bytes']}. "
                "Make the artifact again."
            )
        if verify:
            _check_digest(part, entry)
    return manifest


def load_file(path: Path | str, kind: str, name: str) -> Path:
    """One file of an artifact, hashed; of the others only sizes are checked, as `load(verify=False)` does.

    Raises:
        ArtifactError: as `load`, or there is no such file in it.
    """
    manifest = load(path, kind, verify=False)
    if name not in manifest.files:
        raise ArtifactError(f"The {kind} artifact at {path} has no {name}. Make the artifact again.")
    _check_digest(Path(path) / name, manifest.files[name])
    return Path(path) / name


def _check_digest(part: Path, entry: dict[str, Any]) -> None:
    if sha256_file(part) != entry["sha256"]:
        raise ArtifactError(
            f"{part} was altered: its SHA-256 is not the manifest's {entry['sha256'][:12]}... Make the artifact again."
        )


def current(
    path: Path | str, kind: str, *, config: dict[str, Any], inputs: dict[str, str], target: dict[str, str] | None = None
) -> Manifest | None:
    """The manifest at `path` if it was made from exactly these inputs and config (and for this target), else None.

    A stage whose output is current is skipped (design.md, rule 4), wherever its target lay when it was made. A damaged
    artifact is not current.
    """
    final = Path(path).absolute()
    if any(p.exists() for p in _beside(final)):
        # A writer that works settles by itself, and what it has not finished is not current.
        with contextlib.suppress(ArtifactError), _writing(final):
            _settle(final)
    try:
        manifest = load(path, kind, verify=False)
    except ArtifactError:
        return None
    same = digest_json(manifest.config) == digest_json(config) and manifest.inputs == inputs
    return manifest if same and (target is None or same_target(manifest.target, target)) else None


def _beside(final: Path) -> tuple[Path, Path]:
    """Where an artifact is staged, and where the one before waits while it is replaced."""
    return final.with_name(f".{final.name}.staging"), final.with_name(f".{final.name}.old")


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Holds the right to write an artifact; raises ArtifactError while somebody else does."""
    final.parent.mkdir(parents=True, exist_ok=True)
    file = final.with_name(f".{final.name}.writer")
    with contextlib.ExitStack() as stack:
        patience = time.monotonic() + _PATIENCE
        while True:
            held = stack.enter_context(file.open("a+"))
            try:
                lock(held, wait=False)
            except BlockingIOError:
                if time.monotonic() < patience:
                    time.sleep(0.05)
                    continue
                held.seek(0)
                raise ArtifactError(
                    f"{final} is being written by another process{held.read()}. Wait until it has ended, or stop it, "
                    "and start this again."
                ) from None
            # The writer before took the file away as it ended: a lock on that one would keep nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                    break
        held.truncate(0)
        held.write(f" ({os.getpid()} on {socket.gethostname()})")
        held.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _replace(aside: Path, final: Path) -> None:
    """Puts a whole artifact under its final name; what was there goes away only then."""
    _, old = _beside(final)
    _drop(old)
    if final.exists() or final.is_symlink():
        final.rename(old)
    aside.rename(final)
    _drop(old)


def _drop(old: Path) -> None:
    if old.is_symlink():  # a run may share another's artifact; what it points to is not ours
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def _settle(final: Path) -> None:
    """Ends what a killed writer had begun: a whole artifact that was not renamed yet is, else the old one comes back.

    For writers only, under the lock: who did this without could meet a writer between its two renames.
    """
    aside, old = _beside(final)
    if (aside / MANIFEST).is_file() and not (aside / _KEY).exists():
        _replace(aside, final)
    elif old.exists() and not final.exists():
        old.rename(final)


def _staged_key(aside: Path) -> str | None:
    try:
        return json.loads((aside / _KEY).read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None
