"""What a person at a terminal, or a log collector, sees of a running command."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from pipeline.core.errors import PipelineError, StorageError

_LINE_INTERVAL_SECONDS = 5.0
DISK_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What a disk says that is full, or takes no writing."""


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, count: int = 1) -> None:
        """Count finished units."""

    def note(self, **values: float | str) -> None:
        """Show values beside the bar until they change."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command: a PipelineError ends it with its message and status, Ctrl-C with 130.

    A disk that refuses, wherever it is met, is a StorageError.
    """
    try:
        main()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except OSError as error:
        if error.errno not in DISK_REFUSALS:
            raise
        print(
            f"error: cannot write into {error.filename or 'this folder'}: {error.strerror}. Free "
            "some space or mend the disk, then run the same command again.",
            file=sys.stderr,
        )
        raise SystemExit(StorageError.status) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def say(event: str, **values: float | str) -> None:
    """One line about what a run does: text on a terminal, JSON on stderr where there is none."""
    if sys.stderr.isatty():
        text = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
        )
        _write(f"{event}: {text}")
    else:
        _write(json.dumps({"event": event, **values}))


def warn(message: str) -> None:
    """Say that something is not as it should be, and that the work goes on."""
    _write(f"warning: {message}")


def _write(line: str) -> None:
    """In one piece: other threads write, too."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def progress(label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A live bar with rate and ETA on a terminal; JSON lines where there is none, or no `rich`.

    Args:
        total: units of the whole work.
        unit: plural name of what is counted, e.g. "tasks".
        done: units finished by an earlier, interrupted run; they do not count for the rate.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        with _terminal_bar(label, total, unit, done) as bar:
            yield bar
    else:
        lines = _Lines(label, total, unit, done)
        yield lines
        lines.emit()


class _Lines:
    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = self._first = done
        self._values: dict[str, float | str] = {}
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._last >= _LINE_INTERVAL_SECONDS:
            self.emit()

    def note(self, **values: float | str) -> None:
        self._values.update(values)

    def emit(self) -> None:
        self._last = time.monotonic()
        rate = (self._done - self._first) / max(self._last - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else None
        record = {
            "event": self._label,
            "done": self._done,
            "total": self._total,
            f"{self._unit}_per_second": round(rate, 2),
            "eta_seconds": None if left is None else round(left, 1),
            **{k: round(v, 5) if isinstance(v, float) else v for k, v in self._values.items()},
        }
        _write(json.dumps(record))


@contextmanager
def _terminal_bar(label: str, total: int, unit: str, done: int) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), expand=True) as display:
        task = display.add_task(label, total=total, completed=done, rate="", values="")

        class _Terminal:
            def advance(self, count: int = 1) -> None:
                display.advance(task, count)
                finished = display.tasks[0].completed - done
                rate = finished / max(time.monotonic() - start, 1e-9)
                display.update(task, rate=f"{rate:,.0f} {unit}/s")

            def note(self, **values: float | str) -> None:
                text = " ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in values.items()
                )
                display.update(task, values=text)

        yield _Terminal()
