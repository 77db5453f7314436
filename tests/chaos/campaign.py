"""The record of a campaign of faults: what was tried, what survived, and that it proved anything."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import read_json, write_json
from pipeline.runtime.lineage import git_state
from tests.conftest import REPOSITORY

RESULTS = Path("results/chaos.json")


def is_full() -> bool:
    """Whether the nightly size was asked for (`make chaos SIZE=full`)."""
    return os.environ.get("METALOOM_CHAOS_SIZE", "ci") == "full"


def tries(ci: int, full: int) -> int:
    """How often a fault is tried in this size."""
    return full if is_full() else ci


@dataclass(frozen=True)
class Try:
    """One fault and what came of it."""

    progress: float
    """How far the work was when the fault came, in the unit of the case: steps since it (re)started,
    bytes written, requests answered. Zero proves nothing."""
    survived: bool
    bits_equal: bool | None = None
    """Whether the end was that of an undisturbed run; None where no run ends."""
    steps_lost: int | None = None
    seconds: float | None = None
    """From the fault until work went on."""
    noticed: float | None = None
    """Seconds from the fault until somebody said so"""


@dataclass
class Campaign:
    """All tries of one fault."""

    fault: str
    tries: list[Try] = field(default_factory=list)
    most_lost: int | None = None
    """More lost steps than this fail the campaign."""
    most_noticed: float | None = None
    """Faults noticed later than this many seconds fail the campaign, in the full size: the small one
    runs beside other tests."""
    notes: dict[str, Any] = field(default_factory=dict)
    """More figures of this campaign, such as a longest detection time."""

    def add(self, outcome: Try) -> None:
        """Record one try."""
        self.tries.append(outcome)

    def row(self) -> dict[str, Any]:
        """The campaign as one row of `results/chaos.json`."""
        equal = [t.bits_equal for t in self.tries if t.bits_equal is not None]
        lost = [t.steps_lost for t in self.tries if t.steps_lost is not None]
        seconds = sorted(t.seconds for t in self.tries if t.seconds is not None)
        row = {
            "fault": self.fault,
            "tries": len(self.tries),
            "survived": sum(t.survived for t in self.tries),
            "bits_equal": sum(equal) if equal else None,
            "steps_lost": max(lost) if lost else None,
            "progress_at_kill": [t.progress for t in self.tries],
        }
        if seconds:
            row["median_seconds"] = round(seconds[len(seconds) // 2], 3)
            row["most_seconds"] = round(seconds[-1], 3)
        if noticed := [t.noticed for t in self.tries if t.noticed is not None]:
            row["most_seconds_to_notice"] = round(max(noticed), 3)
        return {**row, **self.notes}

    def check(self) -> None:
        """Fail unless every try proved something and was survived with equal bits."""
        assert self.tries, f"{self.fault}: nothing was tried"
        vacuous = [i for i, t in enumerate(self.tries) if not t.progress > 0]
        assert not vacuous, f"{self.fault}: tries {vacuous} came before any progress"
        died = [i for i, t in enumerate(self.tries) if not t.survived]
        assert not died, f"{self.fault}: tries {died} were not survived"
        lost = [t.steps_lost for t in self.tries if t.steps_lost is not None]
        wrong = [n for n in lost if n < 0 or (self.most_lost is not None and n > self.most_lost)]
        assert not wrong, f"{self.fault}: lost {wrong} steps, at most {self.most_lost} may be"
        late = [n for t in self.tries if (n := t.noticed) is not None]
        late = [n for n in late if self.most_noticed is not None and n > self.most_noticed]
        assert not late or not is_full(), f"{self.fault}: noticed after {late} s"
        unequal = [i for i, t in enumerate(self.tries) if t.bits_equal is False]
        assert not unequal, f"{self.fault}: tries {unequal} ended with other bits"


def save(campaign: Campaign, path: Path = RESULTS) -> None:
    """Put the campaign's row into the results file, in place of an earlier one of the same fault."""
    size = "full" if is_full() else "ci"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:  # other tests may run beside this one
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_json(path)["rows"] if path.exists() else []
        kept = [row for row in rows if (row["fault"], row["size"]) != (campaign.fault, size)]
        new = {**campaign.row(), "size": size, "commit": _commit()}
        write_json(path, {"rows": sorted([*kept, new], key=lambda row: row["fault"])})


def _commit() -> str:
    """What was tried, in short; with a + where the working tree differs from it."""
    state = git_state(REPOSITORY)
    return state.commit[:7] + "+" * state.dirty
