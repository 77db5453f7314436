"""The worker processes of a launcher, found by what they were started with.

They are found where there is a /proc; elsewhere it seems that there are none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pipeline.launch.worker import PARENT

_WORKER = b"pipeline.launch.worker"
_PATIENCE_SECONDS = 10.0
_WATCH_SECONDS = 1.0
"""After that long, a worker that can still do anything has noticed that its launcher is gone."""


def workers_of(launcher: int) -> list[int]:
    """The living workers that a process has started, whoever is their parent now."""
    mark = f"{PARENT}={launcher}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if _WORKER in (entry / "cmdline").read_bytes().split(b"\0"):
                started_with = (entry / "environ").read_bytes().split(b"\0")
                found += [int(entry.name)] if mark in started_with else []
    return found


def is_stopped(process: int) -> bool:
    """Whether SIGSTOP, or whatever has the same effect, keeps it from going on."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state == "T"


def kill(process: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def end_workers_of(launcher: int) -> None:
    """Kill what a launcher that is gone has left behind, and wait until it has ended."""
    if not Path("/proc/self").exists():
        time.sleep(_WATCH_SECONDS)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (left := workers_of(launcher)) and time.monotonic() < deadline:
        for process in left:
            kill(process)
        time.sleep(0.05)
