"""Workers as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import PipelineError, StoppedError, TrainingError
from pipeline.core.files import read_json
from pipeline.launch.attempts import Attempts
from pipeline.launch.base import FINAL, LOST_PEER, REFUSED, STOPPED, Job
from pipeline.launch.fault_notes import FAULT, LOST, note_of
from pipeline.launch.worker import HEARD, PARENT, STARTS, disk_refuses
from pipeline.runtime.logs import say

_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc's switches by which freed activations stay with the process: fetching fresh pages from the
kernel for every gradient costs a tenth of its time. Other C libraries do not know them."""
WORKER_ENVIRONMENT = {**KEEP_MEMORY, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Of every worker, whatever launches it."""
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
STOP_SECONDS = 60.0
"""How long workers that were asked to stop may take to leave a checkpoint."""


class _RestartError(Exception):
    """The workers have to be started again: why."""


def launch_local(job: Job, folder: Path) -> Any:
    """Start one process per worker and wait; if one dies, all start again from the checkpoint.

    Raises:
        PipelineError: a worker's own; or too many starts came to nothing.
        StoppedError: this process was asked to stop, and the workers did.
    """
    prepare(job, folder)
    attempts = Attempts()
    cause = ""
    with stop_asked() as asked:
        while True:
            attempts = attempts.begin(progress_in(folder))
            attempts.check(job.max_restarts, cause)
            if cause:
                say("restart", step=attempts.progress, why=cause)
            try:
                _attempt(job, folder, asked)
                return read_json(folder / "result.json")
            except _RestartError as failure:
                cause = str(failure)
                if asked():
                    raise StoppedError(
                        f"stopped, as asked, while {cause} Run the same command again to go on."
                    ) from None


def prepare(job: Job, folder: Path) -> None:
    """Write the job's configuration where its workers read it."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = [p for kind in ("error", FAULT, LOST) for p in folder.glob(f"{kind}-*.json")]
    told = [folder / name for name in ("result.json", "progress", STARTS, HEARD)]
    for stale in [*told, *notes]:
        stale.unlink(missing_ok=True)
    (folder / "config.json").write_text(job.config.model_dump_json())


def worker_arguments(job: Job, folder: Path) -> list[str]:
    """What `python -m pipeline.launch.worker` is told."""
    kind = type(job.config)
    names = [job.entry, f"{kind.__module__}:{kind.__qualname__}"]
    return [*names, str(folder / "config.json"), str(folder)]


def progress_in(folder: Path) -> int:
    """The step of the last checkpoint that the workers told of."""
    told = folder / "progress"
    text = told.read_text() if told.exists() else ""
    return int(text) if text.isdecimal() else 0


def final_error(folder: Path) -> PipelineError | None:
    """The error of a worker that no new start would mend."""
    for report in sorted(folder.glob("error-*.json")):
        told = json.loads(report.read_text())
        error = getattr(errors, told["kind"], TrainingError)(told["message"])
        assert isinstance(error, PipelineError)
        return error
    return None


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Take SIGTERM and the first Ctrl-C as a wish to stop behind a checkpoint; a second is at once.

    Only the main thread can hear signals; elsewhere nothing is asked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def hear(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    for number in before:
        signal.signal(number, hear)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(job: Job, folder: Path, asked: Callable[[], bool]) -> None:
    """Start the workers and wait until all have ended well.

    Raises:
        PipelineError: a worker's own error, which is final.
        StoppedError: as was asked.
        _RestartError: whatever another start may mend.
    """
    for stale in folder.glob("rendezvous*"):
        stale.unlink()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(job.num_workers):
            workers.append(_start(job, rank, folder))
        _wait(workers, folder, asked)
    finally:
        _kill(workers)


def _start(job: Job, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.launch.worker", *worker_arguments(job, folder)]
    environment = {
        **os.environ,
        PARENT: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_workers),
        "LOCAL_WORLD_SIZE": str(job.num_workers),
        "METALOOM_INIT": f"file://{(folder / 'rendezvous').resolve()}",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK),
        **WORKER_ENVIRONMENT,
    }
    # A session of its own: Ctrl-C reaches this process alone, which then asks every worker once.
    if rank == 0:  # the worker that shows progress keeps the terminal
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with (folder / f"worker-{rank}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait(workers: list[subprocess.Popen[bytes]], folder: Path, asked: Callable[[], bool]) -> None:
    running = dict(enumerate(workers))
    stopped: set[int] = set()
    told_since = lost_since = 0.0
    lost = ""
    while running:
        if asked() and not told_since:
            told_since = time.monotonic()
            for worker in running.values():
                worker.terminate()
        for rank, worker in list(running.items()):
            code = worker.poll()
            if code in (0, STOPPED):
                del running[rank]
                stopped |= {rank} if code == STOPPED else set()
            elif code == LOST_PEER:
                lost_since = lost_since or time.monotonic()
                lost = lost or f"worker {rank}: {note_of(folder, worker.pid)}"
            elif code is not None:
                raise _failed(rank, worker.pid, code, folder)
        now = time.monotonic()
        if lost_since and now - lost_since > _GRACE_SECONDS:
            raise _RestartError(f"workers lost their connections to each other ({lost}).")
        if told_since and now - told_since > STOP_SECONDS:
            raise did_not_stop(progress_in(folder))
        time.sleep(_POLL_SECONDS)
    if stopped:
        _stopped(folder, asked())


def _stopped(folder: Path, asked: bool) -> None:
    if not asked:
        raise _RestartError("a worker was asked to stop, and this process was not")
    raise stopped_as_asked(progress_in(folder))


def stopped_as_asked(step: int) -> StoppedError:
    """The error of a run whose workers stopped at this checkpoint because they were asked to."""
    where = f"behind the checkpoint of step {step}" if step else "before the first step"
    return StoppedError(f"stopped {where}, as asked. Run the same command again to go on.")


def did_not_stop(step: int) -> StoppedError:
    """The error of a run whose workers were asked to stop and had to be killed."""
    return StoppedError(
        f"asked to stop, but no step ended within {STOP_SECONDS:g} s. Run the same command again: "
        f"it goes on from the checkpoint of step {step}."
    )


def _failed(rank: int, process: int, code: int, folder: Path) -> Exception:
    if code == FINAL and (error := final_error(folder)):
        return error
    if code == REFUSED:
        return disk_refuses(folder)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    fault = note_of(folder, process)
    told = f": {fault}" if fault else ""
    log = folder / f"worker-{rank}.log"
    seen = f" Its last words are in {log}." if log.exists() and log.stat().st_size else ""
    return _RestartError(f"worker {rank} {how}{told}.{seen}")


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    """At once, those that are stopped or hang too: a checkpoint is whole at any moment."""
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()
