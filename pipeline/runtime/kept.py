"""What is kept of a run beside its journal: enough to say the whole of it again, later.

`X.jsonl` holds the metric points, `X.events` how the run began, in which runs of the tracking
server it is recorded, which restored stages it links, and how it ended.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.runtime import lineage

_SUFFIX = ".events"


def journal_folder(root: Path) -> Path:
    """Where journals are; not in the copies that DVC makes for experiments and deletes."""
    return lineage.home(root) / ".metaloom" / "journal"


class Kept:
    """The events of one run, appended by its stage and by its recorder.

    Each holds a shared lock on the file as long as it lives; the kernel drops it however it dies.
    """

    def __init__(self, journal: Path) -> None:
        self._file = journal.with_suffix(_SUFFIX).open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event; where the disk is full the live recorder alone has it."""
        try:
            # The line before may be torn: its writer was killed, or the disk was full.
            self._file.write(b"\n" + json.dumps(event).encode() + b"\n")
        except OSError:
            return

    def close(self) -> None:
        """Let go of the run."""
        self._file.close()


def stamped(event: str, **values: Any) -> dict[str, Any]:
    """An event of this moment."""
    return {"event": event, "time": time.time(), **values}


def read_events(journal: Path) -> list[dict[str, Any]]:
    """All whole events of a run, in order."""
    path = journal.with_suffix(_SUFFIX)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [event for line in lines if (event := _parse(line)) is not None]


def kept_journals(root: Path) -> list[Path]:
    """The journals whose runs can be said again, oldest first."""
    found = journal_folder(root).glob(f"*{_SUFFIX}")
    return sorted(
        (path.with_suffix(".jsonl") for path in found),
        key=lambda journal: (_began(journal), journal.name),
    )


@contextmanager
def alone_with(journal: Path) -> Iterator[bool]:
    """Whether nobody else works on this run, held so for the body."""
    try:
        file: IO[bytes] = journal.with_suffix(_SUFFIX).open("rb")
    except FileNotFoundError:
        yield False  # another upload has just ended
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield journal.with_suffix(_SUFFIX).exists()


def forget(journal: Path) -> None:
    """Remove a run's files: all of it has been said. What finds the run again goes last."""
    journal.unlink(missing_ok=True)
    journal.with_suffix(_SUFFIX).unlink(missing_ok=True)


def _began(journal: Path) -> float:
    return min((float(event.get("time", 0.0)) for event in read_events(journal)), default=0.0)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
