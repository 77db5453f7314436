"""A run from now to its end, as its states change."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError
from pipeline.cluster.kube.kinds import JOBS
from pipeline.cluster.kube.retraining import find_job, state_of, why_failed
from pipeline.cluster.kube.runs import trouble_of
from pipeline.cluster.kube.watch import changes_of
from pipeline.core.errors import MachineError

_LOOK_SECONDS = 5.0
_ENDED = ("succeeded", "failed", "cancelled")


class State(NamedTuple):
    """How a run is."""

    state: str
    trouble: str | None
    """What keeps it from running, or ended it"""

    def line(self, run: str) -> str:
        """For people."""
        return f"{run}: {self.state}" + (f" - {self.trouble}" if self.trouble else "")


def follow(kube: Kube, run: str) -> Iterator[State]:
    """Each new state of a run until it has ended; its pods are looked at now and then.

    Raises:
        MachineError: somebody deleted it, or the server refuses.
    """
    job: Mapping[str, Any] = find_job(kube, run)
    last: State | None = None
    with changes_of(kube, JOBS, run) as changes:
        looked = 0.0
        while True:
            state = state_of(job)
            if state in _ENDED or time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                now = State(state, _trouble(kube, job, state))
                if now != last:
                    last = now
                    yield now
                if state in _ENDED:
                    return
            job = _newest(changes, job, run)


def _newest(changes: queue.SimpleQueue[Any], job: Mapping[str, Any], run: str) -> Mapping[str, Any]:
    try:
        change = changes.get(timeout=0.5)
    except queue.Empty:
        return job
    if isinstance(change, ApiError):
        raise change
    if change.what == "DELETED":
        raise MachineError(f"the run {run} was deleted. Submit it again.")
    return dict(change.item)


def _trouble(kube: Kube, job: Mapping[str, Any], state: str) -> str | None:
    if state == "failed":
        return trouble_of(kube, job) or why_failed(job) or None
    return trouble_of(kube, job) if state in ("waiting", "running") else None
