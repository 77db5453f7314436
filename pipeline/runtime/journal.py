"""A local file of metric points: the record that survives whatever happens to a tracking server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """Metrics of one step."""

    step: int
    time: float
    """Seconds since the epoch."""
    metrics: Mapping[str, float]


class Journal:
    """Appends points to a file, one JSON object a line; each line is written by one call."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point, stamped with the present time."""
        record = {"step": step, "time": time.time(), "metrics": dict(metrics)}
        self._file.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_points(path: Path, offset: int = 0) -> Iterator[tuple[Point, int]]:
    """Whole points from a byte offset on, each with the offset behind it.

    A torn last line (its writer was killed, or is still writing) is left for the next call.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = json.loads(line)
            yield Point(record["step"], record["time"], record["metrics"]), offset
