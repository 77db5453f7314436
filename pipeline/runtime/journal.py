"""A local file of metric points: the record that survives whatever happens to a tracking server."""

from __future__ import annotations

import json
import os
import sys
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
    """Appends points to a file, one JSON object a line; each line is written by one call.

    A disk that is full costs points, which is said once; it does not stop the training.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        # A writer before us may have been killed in the middle of a line.
        self._torn = not _ends_whole(path)
        self._told = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point, stamped with the present time."""
        self.append(Point(step, time.time(), metrics))

    def append(self, point: Point) -> None:
        """Append one point with the time that it has."""
        record = {"step": point.step, "time": point.time, "metrics": dict(point.metrics)}
        self._append(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: bytes) -> None:
        wanted = b"\n" + line if self._torn else line
        try:
            written = self._file.write(wanted)
            reason = "the disk took a part of a line"
        except OSError as error:
            written, reason = 0, str(error.strerror)
        if written == len(wanted):
            self._torn = False
            return
        self._torn = self._torn or bool(written)
        if not self._told:
            print(
                f"warning: {self._path} takes no more metrics ({reason}); the stage goes on, and "
                "those until there is room again are lost.",
                file=sys.stderr,
                flush=True,
            )
        self._told = True


def read_points(path: Path, offset: int = 0) -> Iterator[tuple[Point, int]]:
    """Whole points from a byte offset on, each with the offset behind it.

    A torn last line (its writer is still writing) is left for the next call; one in the middle (its
    writer was killed and another went on) is passed over: that point never came to be.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if (point := _parse(line)) is not None:
                yield point, offset


class FreshPoints:
    """A journal's points in order, without what a restarted worker wrote a second time.

    Training that resumes from a checkpoint goes through the steps since then once more, to the same
    values. A metric that has stood in the journal before, with the same step and value, is left
    out; one whose value differs (the steps were done anew otherwise) is a point of its own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last: dict[str, int] = {}
        """The highest step so far, by metric."""
        self._again: dict[tuple[str, int], set[str]] = {}
        """Values by metric and step, from `_from` on: known only while steps are being repeated."""
        self._from: int | None = None

    def take(self, count: int) -> list[Point]:
        """At most this many points that have not been taken yet; empty when there are none now."""
        taken: list[Point] = []
        for point, behind in read_points(self._path, self._offset):
            metrics = self._unrepeated(point)
            self._offset = behind
            if metrics:
                taken.append(Point(point.step, point.time, metrics))
            if len(taken) == count:
                break
        return taken

    def _unrepeated(self, point: Point) -> dict[str, float]:
        backwards = [name for name in point.metrics if point.step <= self._last.get(name, -1)]
        if self._from is not None and point.step > max(self._last.values()):
            self._again, self._from = {}, None
        if backwards and (self._from is None or point.step < self._from):
            self._look_back(point.step)
        watched = self._from is not None and point.step >= self._from
        kept = {}
        for name, value in point.metrics.items():
            known = self._again.setdefault((name, point.step), set()) if watched else set()
            if repr(value) not in known:
                kept[name] = value
            known.add(repr(value))
            self._last[name] = max(point.step, self._last.get(name, -1))
        return kept

    def _look_back(self, first: int) -> None:
        """Collect what the journal holds, up to where we are, from this step on."""
        self._again, self._from = {}, first
        for point, behind in read_points(self._path):
            if behind > self._offset:
                return
            for name, value in point.metrics.items() if point.step >= first else ():
                self._again.setdefault((name, point.step), set()).add(repr(value))


def _parse(line: bytes) -> Point | None:
    try:
        record = json.loads(line)
        return Point(record["step"], record["time"], record["metrics"])
    except (ValueError, KeyError, TypeError):
        return None


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
