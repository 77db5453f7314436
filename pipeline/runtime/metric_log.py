"""Where the metrics of a training run go while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.core.files import write_bytes
from pipeline.runtime.journal import Journal, Point


class MetricLog(Protocol):
    """The main worker writes into it; the others hold one too, for what all do together."""

    def write(self, point: Point) -> None:
        """Record one step; by the main worker alone. The same point twice is one point."""

    def flush(self, step: int) -> bool:
        """All workers are at a checkpoint; True if their machines want them to stop."""

    def close(self) -> None:
        """No more will come."""


class JournalLog:
    """Metrics into a journal on this machine, if there is to be one.

    With `progress`, that file holds the step of the last checkpoint: a launcher that starts the
    workers again reads there whether they got any further.
    """

    def __init__(self, path: Path | None, progress: Path | None = None) -> None:
        self._journal = None if path is None else Journal(path)
        self._progress = progress

    def write(self, point: Point) -> None:
        """Append one point."""
        if self._journal is not None:
            self._journal.append(point)

    def flush(self, step: int) -> bool:
        """Note the step."""
        if self._progress is not None:
            write_bytes(self._progress, str(step).encode())
        return False

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
