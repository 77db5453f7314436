"""The process beside a stage that forwards its journal and events to the tracking server.

Run by `tracking.stage_run` as `python -m pipeline.runtime.recorder ROOT JOURNAL`, with events as
JSON lines on standard input. End of input without an `end` event means that the stage was killed.
It may be killed itself: whatever is said twice is recorded once, so another one says all again.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime import lineage
from pipeline.runtime.journal import FreshPoints, Point, read_points
from pipeline.runtime.kept import Kept, forget, read_events, stamped
from pipeline.runtime.tracking import (
    GAVE_UP,
    INCOMPLETE_TAG,
    KILLED,
    DataInput,
    RunIds,
    RunStart,
    Tracker,
    kept_message,
)

POLL_SECONDS = 1.0
POINTS_IN_A_BATCH = 200


class Recorder:
    """What is still to be said to a tracker; `flush` says it, and may be repeated after a fault."""

    def __init__(self, connect: Callable[[], Tracker], journal: Path) -> None:
        self.ids: RunIds | None = None
        self.num_points = 0
        """Points that were sent."""
        self._connect = connect
        self._points = FreshPoints(journal)
        self._batch: list[Point] = []
        self._tracker: Tracker | None = None
        self._start: RunStart | None = None
        self._known: RunIds | None = None
        self._links: list[Mapping[str, Mapping[str, str]]] = []
        self._end: tuple[str, Mapping[str, str], float] | None = None
        self.done = False

    def accept(self, event: Mapping[str, Any]) -> None:
        """Take note of an event of the stage, or of an earlier recorder of the same run."""
        match event["event"]:
            case "start":
                inputs = [DataInput(**item) for item in event["run"]["inputs"]]
                self._start = RunStart(**{**event["run"], "inputs": inputs})
            case "runs":
                self._known = RunIds(event["parent"], event["child"])
            case "link":
                self._links.append(event["outputs"])
            case "end" if self._end is None:
                self._end = (event["status"], event["tags"], event.get("time", time.time()))

    @property
    def ending(self) -> bool:
        """Whether the stage has ended."""
        return self._end is not None

    @property
    def status(self) -> str:
        """How the stage ended; empty while it runs."""
        return self._end[0] if self._end is not None else ""

    def flush(self) -> None:
        """Forward everything that is known so far."""
        if self._start is None:
            self.done = self.ending
            return
        if self._tracker is None:
            self._tracker = self._connect()
        if self.ids is None:
            self.ids = self._tracker.start(self._start, self._known)
        # A batch that could not be sent is sent again as it was.
        while batch := self._batch or self._points.take(POINTS_IN_A_BATCH):
            self._batch = batch
            self._tracker.log(self.ids, batch)
            self._batch = []
            self.num_points += len(batch)
        while self._links:
            self._tracker.link(self.ids, self._links[0])
            self._links.pop(0)
        if self._end is not None:
            self._tracker.finish(self.ids, *self._end)
            self.done = True

    def give_up(self) -> None:
        """Close the run, if there is one, though not everything of it was said."""
        if self._tracker is None or self.ids is None or self._end is None:
            return
        status, tags, ended = self._end
        with suppress(Exception):
            self._tracker.finish(self.ids, status, {**tags, INCOMPLETE_TAG: "true"}, ended)


@dataclass(frozen=True)
class Patience:
    """How long to go on trying, in seconds."""

    first_backoff: float = 1.0
    longest_backoff: float = 30.0
    silent_server: float = 10.0
    """After the stage's end, without one successful call."""
    whole_flush: float = 60.0
    """After the stage's end, whatever is still being sent."""


def record(
    recorder: Recorder,
    events: queue.Queue[Mapping[str, Any]],
    *,
    on_start: Callable[[RunIds], None],
    stage_lives: Callable[[], bool],
    warn: Callable[[str], None],
    patience: Patience = Patience(),
) -> bool:
    """Forward until the stage has ended and all is said; True when all of it was said."""
    backoff, next_try, warned, told = patience.first_backoff, 0.0, False, False
    ended = last_success = 0.0
    while not recorder.done:
        _take(events, recorder, stage_lives)
        if recorder.ending and not ended:
            ended, next_try = time.monotonic(), 0.0
        if time.monotonic() >= next_try:
            fault = _attempt(recorder)
            if fault is None:
                backoff, last_success = patience.first_backoff, time.monotonic()
            else:
                if not warned:
                    warn(f"MLflow does not take what is sent ({fault}); the stage goes on.")
                warned, next_try = True, time.monotonic() + backoff
                backoff = min(2 * backoff, patience.longest_backoff)
        if recorder.ids is not None and not told:
            on_start(recorder.ids)
            told = True
        silence = time.monotonic() - max(ended, last_success)
        if ended and (
            silence > patience.silent_server or time.monotonic() - ended > patience.whole_flush
        ):
            recorder.give_up()
            break
    return recorder.done


def _attempt(recorder: Recorder) -> str | None:
    """Flush; return the fault, in one line, that stopped it."""
    try:
        recorder.flush()
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    return None


def _take(
    events: queue.Queue[Mapping[str, Any]], recorder: Recorder, stage_lives: Callable[[], bool]
) -> None:
    """Wait for the next event, then take all that are there."""
    try:
        recorder.accept(events.get(timeout=POLL_SECONDS))
        while True:
            recorder.accept(events.get_nowait())
    except queue.Empty:
        if not recorder.ending and not stage_lives():
            recorder.accept(killed())


def killed(at: float | None = None) -> dict[str, Any]:
    """The end of a stage that could not say so itself."""
    event = stamped("end", status=KILLED, tags={"error": "the stage was killed"})
    return event if at is None else {**event, "time": at}


def main() -> None:
    """Serve one stage."""
    root, journal = Path(sys.argv[1]), Path(sys.argv[2])
    kept = Kept(journal)
    # Libraries print to standard output (run links, progress); only the ids belong there.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stage_pid = os.getppid()
    pipeline, owner = lineage.pipeline_key()
    process = lineage.process_name(stage_pid)
    events: queue.Queue[Mapping[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            event = json.loads(line)
            if event["event"] == "start":
                here = {"pipeline": pipeline, "owner": owner, "process": process}
                event = {**event, "run": {**event["run"], **here}}
                kept.write(event)
            events.put(event)
        events.put(killed())

    def connect() -> Tracker:
        from pipeline.runtime.mlflow_tracker import MlflowTracker

        return MlflowTracker(root)

    def tell(ids: RunIds) -> None:
        kept.write(stamped("runs", **asdict(ids)))
        try:
            print(json.dumps(asdict(ids)), file=replies, flush=True)
        except BrokenPipeError:
            return

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    threading.Thread(target=read, daemon=True, name="events").start()
    recorder = Recorder(connect, journal)
    for event in read_events(journal):
        if event["event"] == "runs":  # of a recorder before this one
            recorder.accept(event)
    complete = record(
        recorder, events, on_start=tell, stage_lives=lambda: os.getppid() == stage_pid, warn=warn
    )
    if not complete:
        warn(kept_message(journal, sum(1 for _ in read_points(journal))))
        sys.exit(GAVE_UP)
    forget(journal)


if __name__ == "__main__":
    main()
