"""Processes that a test's own process started, by what Ray calls its actors."""

from __future__ import annotations

import contextlib

import psutil


def below(name: str) -> list[int]:
    """Ids of the processes below this one whose command line has `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while others were looked at
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
