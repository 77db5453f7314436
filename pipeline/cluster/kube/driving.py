"""What a driver in a pod does beside its work: it holds the Lease, and shows how far it is."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.cluster.kube.connect import connect, in_cluster
from pipeline.cluster.kube.exported import exported
from pipeline.cluster.kube.lease import Held, single_flight
from pipeline.core.errors import StoppedError

_STAGE = re.compile(r"^(?:Running stage|Stage) '([^']+)'")
_MOST = 4096
"""Longer lines are no progress."""


@contextmanager
def driving() -> Iterator[Callable[[str], None] | None]:
    """Be the only driver of this namespace while the body runs; outside a pod there is no need.

    Yields:
        What is to hear each line that the run prints; None outside a cluster.

    Raises:
        HeldError: another run is at work.
        MachineError: the API server refuses.
    """
    if not in_cluster():
        yield None
        return
    run = run_of(socket.gethostname())
    before = signal.signal(signal.SIGTERM, _stop)  # while a stage runs, that gets the signal
    try:
        with exported() as export, single_flight(connect(), run) as held:
            held.on_lost = lambda: os.kill(os.getpid(), signal.SIGTERM)  # no two may work at once
            held.check()
            yield Listener(run, held, export)
            held.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    """The first process of a container would not hear it otherwise, nor give the Lease back."""
    raise StoppedError("asked to stop, or the Lease is lost; the same run goes on where it was.")


def run_of(pod: str) -> str:
    """The Job of a pod, whose name is the Job's with five characters behind it."""
    return pod.rpartition("-")[0] or pod


class Listener:
    """Hears what DVC and the stages print; shows stage, step and rate on the Lease.

    Args:
        export: shows the same to Prometheus.
    """

    def __init__(self, run: str, held: Held, export: Callable[[Mapping[str, Any]], None]) -> None:
        self._run, self._held, self._export = run, held, export
        self._stage = ""

    def __call__(self, line: str) -> None:
        """One line of output."""
        if found := _STAGE.match(line):
            self._stage = found[1]
            self._note({})
        elif record := _progress(line):
            self._note(record)

    def _note(self, record: Mapping[str, Any]) -> None:
        progress = {"run": self._run, "stage": self._stage, **record}
        self._held.note(progress)
        self._export(progress)


def _progress(line: str) -> dict[str, Any] | None:
    """A line of a stage's progress, in the words of `metaloom cluster status`."""
    if not line.startswith('{"event"') or len(line) > _MOST:
        return None
    try:
        record = json.loads(line)
        told = {"step": int(record["done"]), "num_steps": int(record["total"])}
    except (ValueError, KeyError, TypeError):
        return None
    rest = ("tasks_per_second", "eta_seconds")
    return {**told, **{key: record[key] for key in rest if record.get(key) is not None}}
