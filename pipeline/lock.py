"""Locks between processes, on files: the system takes them from a process that dies.

Some shared file systems know no locks. Work goes on there without one, and that is said: refusing would cost every user
of such a file system more than a collision, which is rare, costs one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that knows no locks


def lock(file: IO[str], *, wait: bool) -> None:
    """Locks an open file for this process alone, until it is closed; where the file system can't, it says so.

    Raises:
        BlockingIOError: another process has it, and `wait` is False. OSError: it can't be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in _LOCKLESS:
            raise
        place = Path(file.name).parent
        print(f"{place} knows no locks ({e.strerror}): a second writer would not be noticed", flush=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock on `file`, waiting for it as long as it takes. The file, made if it is missing, stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        lock(opened, wait=True)
        yield
