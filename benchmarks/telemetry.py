"""What a tracking server that is gone costs a run: the time of a point, the recorder's processor.

    python -m benchmarks.telemetry [--seconds 60]

A stage writes its metric points into a journal; a recorder beside it forwards them. Here the server
refuses connections, answers nothing, or answers 500, and a stage writes ten points a second. Taken
are the seconds in which a point is written, in the stage, and the recorder's processor time once it
has started, which is all that it can take from the training. The server that records is MLflow's
own on SQLite.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import cpu_model
from pipeline.core.config import Section
from pipeline.core.files import write_json
from pipeline.runtime.lineage import git_state
from pipeline.runtime.tracking import StageRun, stage_run

RECORD = Path("benchmarks/results/telemetry.json")
_POINTS_A_SECOND = 10
_START_SECONDS = 20.0
"""The recorder imports MLflow meanwhile, as it does in every run."""
_HEALTHY = "records"


class _Nothing(Section):
    """The settings of a stage that has none."""


class _Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    def do_POST(self) -> None:
        self.send_error(500)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of each request."""


@contextlib.contextmanager
def _server(kind: str, folder: Path) -> Iterator[str]:
    """The address of a tracking server of this kind."""
    if kind == _HEALTHY:
        yield f"sqlite:///{folder / 'mlflow.db'}"
    elif kind == "answers 500":
        with ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
    else:
        with socket.socket() as listener:  # hangs: the kernel takes connections, nobody answers
            listener.bind(("127.0.0.1", 0))
            if kind == "hangs":
                listener.listen(64)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _recorder() -> psutil.Process:
    (found,) = (
        child
        for child in psutil.Process().children()
        if "pipeline.runtime.recorder" in child.cmdline()
    )
    return found


def _write_points(run: StageRun, seconds: float) -> list[float]:
    """Seconds of each write."""
    spent = []
    for step in range(int(seconds * _POINTS_A_SECOND)):
        begin = time.perf_counter()
        run.log({"loss": 1.0, "accuracy": 0.5, "gradient_norm": 0.1}, step)
        spent.append(time.perf_counter() - begin)
        time.sleep(1 / _POINTS_A_SECOND)
    return spent


def measure(kind: str, seconds: float) -> dict[str, float]:
    """One stage beside one kind of server."""
    with tempfile.TemporaryDirectory() as scratch, _server(kind, Path(scratch)) as address:
        os.environ["MLFLOW_TRACKING_URI"] = address
        with stage_run("telemetry", _Nothing(), root=Path(scratch)) as run:
            _write_points(run, _START_SECONDS)
            recorder = _recorder()
            before, begin = sum(recorder.cpu_times()[:2]), time.monotonic()
            spent = _write_points(run, seconds)
            processor = sum(recorder.cpu_times()[:2]) - before
            share = processor / (time.monotonic() - begin)
    return {"seconds_a_point": statistics.median(spent), "recorder_share_of_a_core": share}


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each kind of server")
    seconds = parser.parse_args().seconds
    rows = {}
    for kind in (_HEALTHY, "refuses", "hangs", "answers 500"):
        rows[kind] = measure(kind, seconds)
        point, share = rows[kind]["seconds_a_point"], rows[kind]["recorder_share_of_a_core"]
        print(f"{kind:12} {1e6 * point:6.0f} us a point, recorder {share:.2%} of a core")
    state = git_state(Path.cwd())
    about = {"commit": state.commit[:7] + "+" * state.dirty, "processor": cpu_model()}
    write_json(RECORD, {**about, "seconds": seconds, "servers": rows})


if __name__ == "__main__":
    main()
