"""What a job tells while it runs, and the wish to stop: small files in the object store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.launch.workspace import Packed
from pipeline.runtime.journal import Journal, Point
from pipeline.runtime.storage import Storage

_STOP, _PROGRESS = "stop", "progress.json"
_PIECE = re.compile(r"journal-(\d{8})\.jsonl")


class Live:
    """The files of one job; both sides may begin again at any time."""

    def __init__(self, storage: Storage, packed: Packed) -> None:
        self._storage = storage
        self._base = f"{storage.base}/{packed.at('live')}"
        self._taken = 0

    def tell_progress(self, told: dict[str, Any]) -> None:
        """How far the run is."""
        self._write(_PROGRESS, json.dumps(told).encode())

    def progress(self) -> dict[str, Any]:
        """What was told last; empty if nothing was."""
        if _PROGRESS not in self._names():
            return {}
        found = json.loads(self._read(_PROGRESS))
        return found if isinstance(found, dict) else {}

    def ask_to_stop(self) -> None:
        """The driver wants the run to end behind a checkpoint."""
        self._write(_STOP, b"1")

    def asked_to_stop(self) -> bool:
        """Whether it does."""
        return _STOP in self._names()

    def send_piece(self, content: bytes) -> None:
        """One more piece of the journal, whole lines; behind those of an earlier attempt."""
        numbers = [int(found[1]) for name in self._names() if (found := _PIECE.fullmatch(name))]
        self._write(f"journal-{max(numbers, default=0) + 1:08d}.jsonl", content)

    def take_points(self) -> Iterator[Point]:
        """The points of all pieces that have not been taken yet, in order."""
        for name in sorted(self._names()):
            found = _PIECE.fullmatch(name)
            if not found or int(found[1]) <= self._taken:
                continue
            for line in self._read(name).splitlines():
                record = json.loads(line)
                yield Point(record["step"], record["time"], record["metrics"])
            self._taken = int(found[1])

    def clear(self) -> None:
        """Forget an earlier attempt's wish to stop and its journal."""
        from pyarrow import fs

        if self._storage.filesystem.get_file_info(self._base).type == fs.FileType.Directory:
            self._storage.filesystem.delete_dir(self._base)

    def _names(self) -> list[str]:
        from pyarrow import fs

        selector = fs.FileSelector(self._base, allow_not_found=True)
        return [info.base_name for info in self._storage.filesystem.get_file_info(selector)]

    def _write(self, name: str, content: bytes) -> None:
        """Under a name of its own first, so that on a mounted disk too nobody reads half of it."""
        filesystem = self._storage.filesystem
        filesystem.create_dir(self._base, recursive=True)
        with filesystem.open_output_stream(f"{self._base}/.new-{name}") as sink:
            sink.write(content)
        filesystem.move(f"{self._base}/.new-{name}", f"{self._base}/{name}")

    def _read(self, name: str) -> bytes:
        with self._storage.filesystem.open_input_stream(f"{self._base}/{name}") as source:
            content: bytes = source.read()
            return content


def append_points(points: Iterator[Point], journal: Path | None) -> int:
    """Into the driver's own journal, if the run has one; returns how many there were.

    Those that it holds already are told apart by whoever reads it.
    """
    taken = list(points)
    if journal is not None and taken:
        own = Journal(journal)
        for point in taken:
            own.append(point)
        own.close()
    return len(taken)
