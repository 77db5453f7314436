"""What happens to the workers of torchrun's agents, told by what they leave in the run's folder."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import NamedTuple

from pipeline.launch.attempts import Attempts
from pipeline.launch.base import REFUSED
from pipeline.launch.fault_notes import note_of, read_notes
from pipeline.launch.local import progress_in
from pipeline.launch.worker import STARTS, disk_refuses
from pipeline.runtime.logs import say

AGENT_LOG = "agent.log"
_ENDED = re.compile(
    r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)|Detected (\d+) new nodes"
)


class Start(NamedTuple):
    """One time that the workers were started."""

    progress: int
    """Step of the checkpoint that they found"""
    world_size: int


class Story:
    """What the driver has told of a run so far; it tells each thing once."""

    def __init__(self, folder: Path, max_restarts: int) -> None:
        self._folder, self._max_restarts = folder, max_restarts
        self._attempts = Attempts()
        self._starts: list[Start] = []
        self._at_agent = 0
        """Starts that there were when the present agent began"""
        self._lost_agent = ""
        self._old: set[int] = set()
        """Processes whose notes belong to earlier starts"""
        self._old_ends = 0
        """Ends in the agent's log that belong to them"""
        self._fault_told = False

    def tell(self) -> None:
        """Say what is new: a fault at once, a start with what made it necessary.

        Raises:
            TrainingError: the workers have been started too often.
            StorageError: the disk takes no writing, which no start would mend.
        """
        for start in read_starts(self._folder)[len(self._starts) :]:
            self._begin(start)
        if not self._fault_told and (fault := self._new_fault()):
            rank, why = fault
            say("fault", worker=rank, why=why)
            self._fault_told = True

    def lost_agent(self, how: str) -> None:
        """The agent is gone, and another one is to go on.

        Raises:
            TrainingError: that makes too many starts.
        """
        self.tell()
        if len(self._starts) == self._at_agent:  # none of its workers had begun: a start as well
            self._attempts = self._attempts.begin(progress_in(self._folder))
            self._attempts.check(self._max_restarts, how)
        self._at_agent, self._lost_agent = len(self._starts), how

    def cause(self) -> str:
        """What ended the workers the last time, as they or the agent tell it.

        Raises:
            StorageError: they could not even write.
        """
        if self._lost_agent:
            return self._lost_agent
        return self._cause(grew=False)

    def _new_fault(self) -> tuple[str, str] | None:
        """The first worker that ended since the last start, by its own words or the agent's."""
        for note in read_notes(self._folder):
            if note.process not in self._old:
                return str(note.rank), note.message
        ended = _ENDED.findall(_text(self._folder / AGENT_LOG))
        for status, rank, _, more in ended[self._old_ends :]:
            if not more:
                return rank, f"worker {rank} {how_it_ended(int(status))}"
        return None

    def _begin(self, start: Start) -> None:
        grew = bool(self._starts) and start.world_size > self._starts[-1].world_size
        is_first = not self._attempts.total
        self._starts.append(start)
        self._attempts = self._attempts.begin(start.progress, counts=not grew)
        if is_first:
            return
        why = self._lost_agent or self._cause(grew)
        self._attempts.check(self._max_restarts, why)
        say("restart", step=start.progress, why=why)
        self._old = {note.process for note in read_notes(self._folder)}
        self._old_ends = len(_ENDED.findall(_text(self._folder / AGENT_LOG)))
        self._lost_agent, self._fault_told = "", False

    def _cause(self, grew: bool) -> str:
        ended = _ENDED.findall(_text(self._folder / AGENT_LOG))
        notes = [n.message for n in read_notes(self._folder) if n.process not in self._old]
        told = f": {notes[0]}" if notes else ""
        logs = f" Its last words are in {self._folder}."
        if not ended:
            return f"the workers could not be started{told}.{logs}"
        status, rank, process, more = ended[-1]
        if more and grew:
            return f"{more} more host{'s have' if int(more) > 1 else ' has'} come."
        if more:
            return f"another host starts its workers again{told}."
        if int(status) == REFUSED:
            raise disk_refuses(self._folder)
        how = how_it_ended(int(status))
        if own := note_of(self._folder, int(process)):
            told = f": {own}"
        return f"worker {rank} {how}{told}.{logs}"


def how_it_ended(status: int) -> str:
    """Of a process's return code, in words."""
    return (
        f"was killed by {signal.Signals(-status).name}"
        if status < 0
        else (f"ended with status {status}")
    )


def read_starts(folder: Path) -> list[Start]:
    """The times that this host's workers were started; each writes a line of two numbers."""
    lines = [line.split() for line in _text(folder / STARTS).splitlines(keepends=True)]
    return [Start(int(line[0]), int(line[1])) for line in lines if len(line) == 2]


def agents_last_words(folder: Path) -> str:
    """Why the agent gave up, from its log."""
    told = re.findall(r"the agent ended: (.*)", _text(folder / AGENT_LOG))
    return told[-1] if told else "it does not say why"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
