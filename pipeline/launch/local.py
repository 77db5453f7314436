"""Workers as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import PipelineError, TrainingError
from pipeline.core.files import read_json
from pipeline.launch.base import LOST_PEER, Job

_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc's switches by which freed activations stay with the process: fetching fresh pages from the
kernel for every gradient costs a tenth of its time. Other C libraries do not know them."""
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0


def launch_local(job: Job, folder: Path) -> Any:
    """Start one process per worker and wait; if one dies, the others are stopped.

    Raises:
        PipelineError: a worker failed; the message is that worker's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "rendezvous", folder / "result.json", *folder.glob("error-*.json")]:
        stale.unlink(missing_ok=True)
    config_file = folder / "config.json"
    config_file.write_text(job.config.model_dump_json())
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(job.num_workers):
            workers.append(_start(job, rank, config_file, folder))
        _wait(workers, folder)
    finally:
        _stop(workers)
    return read_json(folder / "result.json")


def _start(job: Job, rank: int, config_file: Path, folder: Path) -> subprocess.Popen[bytes]:
    kind = type(job.config)
    command = [
        *(sys.executable, "-m", "pipeline.launch.worker", job.entry),
        *(f"{kind.__module__}:{kind.__qualname__}", str(config_file), str(folder)),
    ]
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_workers),
        "LOCAL_WORLD_SIZE": str(job.num_workers),
        "METALOOM_RENDEZVOUS": f"file://{(folder / 'rendezvous').resolve()}",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **KEEP_MEMORY,
    }
    if rank == 0:  # the worker that shows progress keeps the terminal
        return subprocess.Popen(command, env=environment)
    with (folder / f"worker-{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(workers: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Return when all have ended well.

    Raises:
        PipelineError: the first failure's own error, or a description of how the worker ended.
    """
    running = dict(enumerate(workers))
    lost_since = None
    while running:
        for rank, worker in list(running.items()):
            code = worker.poll()
            if code == 0:
                del running[rank]
            elif code is not None and code != LOST_PEER:
                raise _failure(rank, code, folder)
            elif code == LOST_PEER:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _GRACE_SECONDS:
                    raise _failure(rank, code, folder)
        time.sleep(_POLL_SECONDS)


def _failure(rank: int, code: int, folder: Path) -> PipelineError:
    for report in sorted(folder.glob("error-*.json")):
        told = json.loads(report.read_text())
        error = getattr(errors, told["kind"], TrainingError)(told["message"])
        assert isinstance(error, PipelineError)
        return error
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    log = folder / f"worker-{rank}.log"
    seen = f" Its last words are in {log}." if log.exists() and log.stat().st_size else ""
    return TrainingError(
        f"worker {rank} {how}, so the others were stopped.{seen} Run the same command again: it "
        "resumes from the last checkpoint."
    )


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
