"""What runs in the Ray head of a job: the `ray_train` launcher, watched by a process beside it.

The one that watches sends the journal and the progress to the object store, passes on the wish to
stop, and leaves what came of the job there, however the other one ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.core.errors import PipelineError
from pipeline.core.files import new_folder, read_json, write_json
from pipeline.launch.base import ORPHAN, Job, bounds_from_environment
from pipeline.launch.live import Live
from pipeline.launch.outputs import put_outputs
from pipeline.launch.worker import PARENT, end_with_parent
from pipeline.launch.workspace import WORKSPACE, Packed, job_from_environment, unpack
from pipeline.runtime.logs import run_main, warn
from pipeline.runtime.storage import Storage

OUTCOME = "outcome.json"
_POLL_SECONDS = 0.5
_SEND_SECONDS = 2.0
_FOLDER = Path(".metaloom/launch/cluster")


def main() -> None:
    """Without arguments: watch over the job of this pod. With `run`: run it."""
    workspace = Path(os.environ.get(WORKSPACE) or ".").resolve()
    storage, packed = job_from_environment()
    workspace.mkdir(parents=True, exist_ok=True)
    job = unpack(storage, packed, workspace)
    os.chdir(workspace)
    if sys.argv[1:] == ["run"]:
        threading.Thread(target=end_with_parent, daemon=True).start()
        _run(job)
        return
    if "result" in storage.names(packed.folder):  # of an attempt before this one
        return
    outcome = _watch_over(storage, packed, job)
    if outcome is None:
        raise SystemExit(1)  # KubeRay tries again, and training goes on from its last checkpoint
    _leave(storage, packed, job, outcome)


def _run(job: Job) -> None:
    """Train on this Ray cluster; leave the result, or the error."""
    from pipeline.launch.ray_train import launch_ray_train

    try:
        outcome: dict[str, Any] = {"result": launch_ray_train(_as_many_as_here(job), _FOLDER)}
    except PipelineError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    write_json(_FOLDER / OUTCOME, outcome)


def _as_many_as_here(job: Job) -> Job:
    """The number of workers that the template's own METALOOM_NUM_WORKERS asks for, if it does."""
    value = os.environ.get("METALOOM_NUM_WORKERS", "")
    if not value:
        return job
    least, most = bounds_from_environment("METALOOM_NUM_WORKERS", value)
    return job._replace(num_workers=most, min_workers=least)


def _watch_over(storage: Storage, packed: Packed, job: Job) -> dict[str, Any] | None:
    """Start the launcher and wait; None if another try may do: it died, or this pod goes away."""
    (_FOLDER / OUTCOME).unlink(missing_ok=True)
    going = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: going.set())
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.launch.kubernetes_entry", "run"],
        stderr=subprocess.PIPE,
        env={**os.environ, PARENT: str(os.getpid())},
        start_new_session=True,
    )
    told = _Teller(Live(storage, packed), getattr(job.config, "journal", None))
    assert child.stderr is not None
    reader = threading.Thread(target=told.listen, args=(child.stderr,), daemon=True)
    reader.start()
    asked = stopping = False
    sent = 0.0
    while child.poll() is None:
        if time.monotonic() - sent > _SEND_SECONDS:
            sent = time.monotonic()
            asked = told.send() or asked
        if (asked or going.is_set()) and not stopping:
            stopping = True
            child.terminate()
        time.sleep(_POLL_SECONDS)
    reader.join(5)
    told.send()
    if not (_FOLDER / OUTCOME).exists():
        how = "no outcome" if child.returncode != ORPHAN else "no parent"
        warn(f"the launcher ended with status {child.returncode} and {how}")
        return None
    outcome = read_json(_FOLDER / OUTCOME)
    if going.is_set() and not asked and outcome.get("error") == "StoppedError":
        return None
    found: dict[str, Any] = outcome
    return found


class _Teller:
    """Sends what is new of the journal and of the progress."""

    def __init__(self, live: Live, journal: Path | None) -> None:
        self._live, self._journal = live, journal
        self._offset = 0
        self._progress: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._warned = False

    def listen(self, stream: IO[bytes]) -> None:
        """Pass on what the launcher prints, and keep the newest line of progress."""
        for line in stream:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            if found := progress_in(line.decode(errors="replace")):
                self._progress = found

    def send(self) -> bool:
        """Send; returns whether the driver wants us to stop. A store that is away is no fault."""
        try:
            for piece in self._pieces():
                self._live.send_piece(piece)
                self._offset += len(piece)
            if self._progress != self._told:
                self._told = dict(self._progress)
                self._live.tell_progress(self._told)
            return self._live.asked_to_stop()
        except OSError as error:
            if not self._warned:
                warn(f"the object store takes no journal ({str(error)[:200]}); training goes on.")
            self._warned = True
            return False

    def _pieces(self) -> Iterator[bytes]:
        if self._journal is None or not self._journal.exists():
            return
        with self._journal.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            yield whole


def progress_in(line: str) -> dict[str, Any]:
    """The numbers of a line of progress, such as a worker prints; empty if it is none."""
    begin, end = line.find('{"event"'), line.rfind("}")
    if begin < 0 or '"done"' not in line:
        return {}
    try:
        found = json.loads(line[begin : end + 1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _leave(storage: Storage, packed: Packed, job: Job, outcome: dict[str, Any]) -> None:
    """Outputs first: a result that is there is whole."""
    if "result" in outcome:
        put_outputs(storage, job.outputs, packed.at("outputs"))
    with tempfile.TemporaryDirectory() as scratch:
        with new_folder(Path(scratch) / "result", kind="result") as folder:
            write_json(folder / OUTCOME, outcome)
        storage.put(Path(scratch) / "result", packed.at("result"))


if __name__ == "__main__":
    run_main(main)
