"""The desk between the driver and the workers of a Ray run, and the watch that the driver keeps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.core.errors import MachineError
from pipeline.core.ray_cluster import knock
from pipeline.launch.attempts import Attempts
from pipeline.launch.base import Job
from pipeline.launch.local import STOP_SECONDS
from pipeline.runtime.logs import say

_POLL_SECONDS = 0.25
_KNOCK_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_ABORT_SECONDS = 10.0
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class Told(NamedTuple):
    """What the workers have said."""

    error: dict[str, str] | None
    """What was failed with."""
    result: dict[str, Any] | None
    """What it finished with."""
    progress: int
    """Step of the last checkpoint."""
    restarts: list[tuple[int, str]]
    """For each new start of the workers: from which step, and why."""
    faults: list[str]
    """What a worker said before it ended, each time the first one that did."""


class Desk:
    """An actor beside the driver: what the workers and the driver tell each other."""

    def __init__(self, max_restarts: int, environment: dict[str, str]) -> None:
        self._environment = environment
        self._max_restarts = max_restarts
        self._attempts, self._cause, self._told = Attempts(), "the workers ended.", ""
        self._progress = 0
        self._restarts: list[tuple[int, str]] = []
        self._faults: list[str] = []
        self._error: dict[str, str] | None = None
        self._result: dict[str, Any] | None = None
        self._stop = False

    def failed(self, cause: str) -> None:
        """A group of workers has failed, not gone because of its machines."""
        self._attempts = self._attempts.begin(self._progress)
        self._cause = self._told or cause
        self._told = ""
        if self._attempts.count > self._max_restarts:
            starts = f" ({self._attempts.count} starts from step {self._progress})"
            self.fail(
                "TrainingError",
                f"{self._cause} Run the same command again: it resumes from the last checkpoint"
                f"{starts if self._max_restarts else ''}.",
            )
        else:
            self._restarts.append((self._progress, self._cause))

    def moved(self, why: str) -> None:
        """The workers' machines go away with notice, which is no failure."""
        self._restarts.append((self._progress, why))

    def reach(self, step: int) -> None:
        """There is a checkpoint of this step."""
        self._progress = step

    def fault(self, message: str) -> None:
        """Why the workers have to be started again; the first one has the story."""
        if not self._told:
            self._told = message
            self._faults.append(message)

    def fail(self, kind: str, message: str) -> None:
        """An error that no new start would mend."""
        self._error = self._error or {"kind": kind, "message": message}

    def finish(self, result: dict[str, Any]) -> None:
        """The run has ended well."""
        self._result = result

    def stop(self) -> None:
        """The driver was asked to stop."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether the workers have to stop."""
        return self._stop

    def environment(self) -> dict[str, str]:
        """The variables that the driver hands to its workers."""
        return self._environment

    def told(self) -> Told:
        """All that the workers have said so far."""
        return Told(self._error, self._result, self._progress, self._restarts, self._faults)


def open_desk(ray: Any, job: Job, environment: dict[str, str]) -> Any:
    """On the driver's node, so that no other node's death takes it away."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=here)
    return actor.remote(job.max_restarts, environment)


def ask(ray: Any, desk: Any) -> Told:
    """What was told at the desk.

    Raises:
        MachineError: it does not answer; as it is on our own node, Ray is not there any more.
    """
    try:
        told: Told = ray.get(desk.told.remote(), timeout=_ANSWER_SECONDS)
    except (ray.exceptions.RayError, OSError, RuntimeError):
        raise went_away() from None
    return told


def went_away() -> MachineError:
    """The cluster is not there any more."""
    return MachineError(
        f"the Ray cluster at {os.environ.get('RAY_ADDRESS') or 'this machine'} went away during "
        "the run. Start it again, then run the same command again: it resumes from the last "
        "checkpoint."
    )


@contextmanager
def watched(ray: Any, desk: Any, asked: Callable[[], bool]) -> Iterator[threading.Event]:
    """A thread at the desk while Ray Train has the main one; the event says that Ray went away."""
    ended, gone = threading.Event(), threading.Event()
    arguments = (ray, desk, asked, ended, gone)
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True, name="watch")
    watcher.start()
    try:
        yield gone
    finally:
        ended.set()
        watcher.join(_ANSWER_SECONDS + _KNOCK_SECONDS)


def _watch(
    ray: Any,
    desk: Any,
    asked: Callable[[], bool],
    ended: threading.Event,
    gone: threading.Event,
) -> None:
    """Pass on that the driver was asked to stop; say faults and new starts; end a failed run."""
    gcs = ray.get_runtime_context().gcs_address
    stopping, said, faults = 0.0, 0, 0
    heard = knocked = time.monotonic()
    while not ended.wait(_POLL_SECONDS):
        now = time.monotonic()
        if asked():
            stopping = stopping or now
            desk.stop.remote()  # each time: nobody says whether the last one arrived
        failed = False
        try:
            told = ask(ray, desk)
            if now - knocked > _KNOCK_SECONDS:
                knock(gcs)
                knocked = now
            heard = now
        except (MachineError, OSError):
            if now - heard > _silence():
                gone.set()
        else:
            for why in told.faults[faults:]:  # Ray's controller hears of it up to two seconds later
                say("fault", why=why)
            for step, why in told.restarts[said:]:
                say("restart", step=step, why=why)
            faults, said, failed = len(told.faults), len(told.restarts), told.error is not None
        if gone.is_set() or failed or (stopping and now - stopping > STOP_SECONDS):
            _give_up(ended, 1.0 if gone.is_set() else _ABORT_SECONDS)
            return


def _give_up(ended: threading.Event, patience: float) -> None:
    """Ray Train restarts whatever fails; Ctrl-C is the way by which it lets a run be given up.

    The first asks its controller to end the workers; the third waits for nobody.
    """
    while not ended.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(patience)


def _silence() -> float:
    """How long the cluster may say nothing: at twice that, Ray's client ends the whole process."""
    return float(os.environ.get(_RECONNECT) or 60) / 2
