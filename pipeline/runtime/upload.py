"""Say to the tracking server what could not be said to it while a stage ran: `metaloom upload`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import RegistryError
from pipeline.runtime.journal import read_points
from pipeline.runtime.kept import alone_with, forget, journal_folder, kept_journals, read_events
from pipeline.runtime.recorder import Recorder, killed
from pipeline.runtime.tracking import Tracker


@dataclass(frozen=True)
class Outcome:
    """What became of one kept run."""

    journal: str
    stage: str
    outcome: str
    """`sent`, `left` (somebody still works on it) or `refused`."""
    detail: str
    points: int
    run_id: str | None = None


def upload(root: Path, connect: Callable[[], Tracker]) -> list[Outcome]:
    """Send every kept run, oldest first; what has arrived is deleted here.

    It may be killed and run again, and it may send what is there already: every call to a tracker
    changes nothing the second time. Runs of stages that are still going are left alone.

    Raises:
        RegistryError: the tracking server cannot be used at all; everything is still here.
    """
    journals = kept_journals(root)
    if not journals:
        return []
    try:
        tracker = connect()
    except Exception as error:  # whatever a client, its HTTP library or its database raises
        raise RegistryError(
            f"nothing was sent: {_reason(error)}. {len(journals)} runs are still kept in "
            f"{journal_folder(root)}. Start the server, or set MLFLOW_TRACKING_URI right, and "
            "run `metaloom upload` again; `metaloom doctor` looks into it."
        ) from None
    return [_upload_one(journal, lambda: tracker) for journal in journals]


def as_text(outcomes: list[Outcome]) -> str:
    """For people: a run a line."""
    if not outcomes:
        return "Nothing is kept here: MLflow has everything."
    return "\n".join(
        f"{found.outcome:<8}{found.stage}: {found.points:,} points, {found.detail}"
        + (f" -> run {found.run_id}" if found.run_id else "")
        for found in outcomes
    )


def refuse_unsent(outcomes: list[Outcome]) -> None:
    """End the command when something that nobody works on is still here.

    Raises:
        RegistryError: names it, and the first reason.
    """
    kept = [found for found in outcomes if found.outcome == "refused"]
    if kept:
        raise RegistryError(
            f"{len(kept)} of {len(outcomes)} kept runs could not be sent whole and are still here: "
            f"{', '.join(found.journal for found in kept)}. The first fault: {kept[0].detail}. "
            "Run `metaloom upload` again when it is mended: what has arrived stays once."
        )


def _upload_one(journal: Path, connect: Callable[[], Tracker]) -> Outcome:
    with alone_with(journal) as alone:
        if not alone:
            count = sum(1 for _ in read_points(journal))
            detail = "its stage, or another upload, still works on it"
            return Outcome(journal.name, _stage(journal), "left", detail, count)
        recorder = Recorder(connect, journal)
        events = read_events(journal)
        for event in events:
            recorder.accept(_without_process(event))
        if not recorder.ending:
            recorder.accept(killed(at=_last_sign(journal, events)))
        stage = _stage(journal)
        try:
            recorder.flush()
        except Exception as error:  # as above; the files stay, the other runs are still sent
            return Outcome(journal.name, stage, "refused", _reason(error), recorder.num_points)
        forget(journal)
    run_id = recorder.ids.child if recorder.ids else None
    return Outcome(journal.name, stage, "sent", recorder.status, recorder.num_points, run_id)


def _without_process(event: dict[str, Any]) -> dict[str, Any]:
    """We hold its lock, so the stage has ended, even if it ran on a host that we cannot ask."""
    return {**event, "run": {**event["run"], "process": ""}} if "run" in event else event


def _stage(journal: Path) -> str:
    starts = [event["run"]["stage"] for event in read_events(journal) if event["event"] == "start"]
    return starts[-1] if starts else journal.stem


def _last_sign(journal: Path, events: list[dict[str, Any]]) -> float:
    """When a stage that never said its end was last seen alive, in seconds since the epoch."""
    said = [float(event["time"]) for event in events if "time" in event]
    return max([*said, *(point.time for point, _ in read_points(journal))], default=0.0)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
