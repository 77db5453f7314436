"""What workers say of the fault that ended them: one file for each process, which stays."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.core.files import write_json

FAULT, LOST = "fault", "lost"
"""Kinds of notes: what went wrong here; a peer is gone, which has the better story."""


class Note(NamedTuple):
    """One worker's last words."""

    rank: int
    process: int
    message: str


def leave_note(folder: Path, rank: str, message: str, kind: str = FAULT) -> None:
    """Say why this process ends; its id in the name keeps the notes of other starts apart."""
    write_json(folder / f"{kind}-{rank}-{os.getpid()}.json", {"message": message})


def read_notes(folder: Path, kind: str = FAULT) -> list[Note]:
    """All notes of a kind, the oldest first; one that goes away while it is read was none."""
    found = []
    for path in folder.glob(f"{kind}-*-*.json"):
        named = re.fullmatch(rf"{kind}-(\d+)-(\d+)\.json", path.name)
        try:
            message, time = json.loads(path.read_text())["message"], path.stat().st_mtime_ns
        except (OSError, ValueError, LookupError):
            continue
        if named:
            found.append((time, Note(int(named[1]), int(named[2]), str(message))))
    return [note for _, note in sorted(found)]


def note_of(folder: Path, process: int) -> str:
    """What that very process said, or nothing."""
    notes = read_notes(folder) + read_notes(folder, LOST)
    return next((n.message for n in notes if n.process == process), "")
