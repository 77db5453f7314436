"""Workers under torchrun's agents, on one host or many that come and go.

The driver's host runs the first agent, which holds the rendezvous; other hosts run `metaloom join
HOST:PORT`, which learns the job from there. Ranks are torchrun's; the main worker is the first one
of the driver's host, so that what it leaves is where DVC looks for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core import errors
from pipeline.core.errors import ConfigError, StoppedError, TrainingError
from pipeline.core.files import read_json
from pipeline.launch.attempts import Attempts
from pipeline.launch.base import Job, bounds_from_environment, num_workers_from_environment
from pipeline.launch.local import (
    WORKER_ENVIRONMENT,
    final_error,
    prepare,
    progress_in,
    stop_asked,
    worker_arguments,
)
from pipeline.launch.network import Endpoint, free_endpoint, interface_towards, parse_endpoint
from pipeline.launch.worker import PARENT, STARTS, resolve
from pipeline.runtime.lineage import code_hash, code_root
from pipeline.runtime.logs import say
from pipeline.runtime.noticeboard import Noticeboard

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0
_LAST_CALL_SECONDS = 2
"""How long the agents wait for more hosts once there are enough."""
_MANY = 1_000_000
"""The agents start the workers again without end; how often is enough, the driver counts."""


class Hosts(NamedTuple):
    """The hosts of a run."""

    least: int
    most: int
    rendezvous: Endpoint


def launch_torchrun(job: Job, folder: Path) -> Any:
    """Start this host's agent and wait; workers that die, or hosts that come or go, start all anew.

    METALOOM_NODES says how many hosts (`2`, or elastic `1:3`; default 1), METALOOM_RENDEZVOUS where
    this one listens for the others (host:port). METALOOM_NUM_WORKERS is the number on each host.

    Raises:
        PipelineError: a worker's own; or too many starts came to nothing.
        StoppedError: this process was asked to stop, and the workers did.
    """
    hosts = _hosts_from_environment()
    prepare(job, folder)
    run = uuid.uuid4().hex[:12]
    with stop_asked() as asked:
        agent = _start_agent(job, folder, hosts, run, is_main=True)
        try:
            board = _announce(job, hosts, run) if hosts.most > 1 else None
            _wait(agent, job, folder, asked, board)
        finally:
            _end(agent)
    return read_json(folder / "result.json")


def join_runs(rendezvous: str, folder: Path, *, once: bool = False) -> None:
    """Serve as one more host of the runs that a driver announces, one after the other.

    Args:
        rendezvous: host:port of the driver.
        folder: for what the workers of the runs write.
        once: end with the first run.

    Raises:
        ConfigError: that is no address, or the driver runs other code than this host has.
    """
    endpoint = parse_endpoint(rendezvous)
    _, num_workers = num_workers_from_environment(_MANY)
    say("join", waiting_for=str(endpoint), workers=float(num_workers))
    last = ""
    with stop_asked() as asked:
        while not asked():
            told = _next_job(endpoint, last)
            if told is None:
                time.sleep(_POLL_SECONDS)
                continue
            last = told["run"]
            say("join", run=last, entry=told["entry"])
            _serve(told, endpoint, num_workers, folder / last, asked)
            if once:
                return


def _serve(
    told: Mapping[str, Any],
    endpoint: Endpoint,
    num_workers: int,
    folder: Path,
    asked: Callable[[], bool],
) -> None:
    """Take part in one run until it ends, or until the driver is gone."""
    if told["code"] != code_hash(code_root()):
        raise ConfigError(
            f"the driver at {endpoint} runs other code than this host has. Check out the same "
            "commit on both, then run `metaloom join` again."
        )
    ours = told["entry"].startswith("pipeline.") and told["config_type"].startswith("pipeline.")
    if not ours or not re.fullmatch(r"[0-9a-f]{12}", told["run"]):
        raise ConfigError(f"{endpoint} announces {told['entry']!r}, which is no run of ours.")
    config = resolve(told["config_type"]).model_validate(told["config"])
    job = Job(told["entry"], config, num_workers)
    prepare(job, folder)
    hosts = Hosts(told["least"], told["most"], endpoint)
    agent = _start_agent(job, folder, hosts, told["run"], is_main=False)
    try:
        while agent.poll() is None:
            if asked():
                agent.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    agent.wait(_GRACE_SECONDS)
                return
            if error := final_error(folder):
                with contextlib.suppress(RuntimeError):  # a driver that has gone needs no telling
                    board = Noticeboard.connect(endpoint.host, endpoint.port)
                    board.put("error", {"kind": type(error).__name__, "message": str(error)})
                return
            time.sleep(_POLL_SECONDS)
        if not agent.returncode:
            shutil.rmtree(folder)  # kept when the run failed: it holds the workers' logs
    finally:
        _end(agent)


def _hosts_from_environment() -> Hosts:
    value = os.environ.get("METALOOM_NODES") or "1"
    least, most = bounds_from_environment("METALOOM_NODES", value)
    place = os.environ.get("METALOOM_RENDEZVOUS", "")
    if most > 1 and not place:
        raise ConfigError(
            f"METALOOM_NODES is {value}, but METALOOM_RENDEZVOUS does not say where the other "
            "hosts find this one. Set it to <this host's address>:<a free port>, and on each "
            "other host run `metaloom join` with the same."
        )
    rendezvous = parse_endpoint(place) if place else free_endpoint()
    return Hosts(least or most, most, rendezvous)


def _start_agent(
    job: Job, folder: Path, hosts: Hosts, run: str, *, is_main: bool
) -> subprocess.Popen[bytes]:
    local = interface_towards(hosts.rendezvous, listening=is_main)
    restarts = _MANY if job.max_restarts or not is_main else 0
    others = ",".join(f"{rank}:3" for rank in range(0 if not is_main else 1, job.num_workers))
    conf = f"is_host={int(is_main)},last_call_timeout={_LAST_CALL_SECONDS},keep_alive_interval=2"
    options = {
        "nnodes": f"{hosts.least}:{hosts.most}",
        "nproc-per-node": str(job.num_workers),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": str(hosts.rendezvous),
        "rdzv-id": run,
        "rdzv-conf": conf,
        "max-restarts": str(restarts),
        "monitor-interval": "0.1",
        "local-addr": local.address,
        "log-dir": str(folder / "logs"),
        **({"redirects": others} if others else {}),
    }
    command = [sys.executable, "-m", "pipeline.launch.torchrun_agent", str(folder / "agent.log")]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--module", "pipeline.launch.worker", *worker_arguments(job, folder)]
    environment = {
        **os.environ,
        **WORKER_ENVIRONMENT,
        PARENT: str(os.getpid()),
        "METALOOM_MAIN_HOST": str(int(is_main)),
        # With it, a host that comes later waits for an address that nobody tells it (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", local.interface),
    }
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _announce(job: Job, hosts: Hosts, run: str) -> Noticeboard:
    """Tell the hosts that join what to run."""
    board = Noticeboard.connect(hosts.rendezvous.host, hosts.rendezvous.port)
    kind = type(job.config)
    told = {
        "run": run,
        "code": code_hash(code_root()),
        "entry": job.entry,
        "config_type": f"{kind.__module__}:{kind.__qualname__}",
        "config": job.config.model_dump(mode="json"),
        "least": hosts.least,
        "most": hosts.most,
    }
    board.put("job", told)
    return board


def _next_job(endpoint: Endpoint, last: str) -> dict[str, Any] | None:
    """What the driver wants done, if there is one with a job that is not the last one."""
    try:
        with socket.create_connection(endpoint, timeout=1.0):
            pass
        told = _told(Noticeboard.connect(endpoint.host, endpoint.port), "job")
    except (OSError, RuntimeError):
        return None
    return told if told and told["run"] != last else None


def _told(board: Noticeboard | None, name: str) -> dict[str, Any] | None:
    """A note on the board; None also when the agent that holds the board has just ended."""
    try:
        note: dict[str, Any] | None = None if board is None else board.get(name)
    except RuntimeError:
        return None
    return note


def _wait(
    agent: subprocess.Popen[bytes],
    job: Job,
    folder: Path,
    asked: Callable[[], bool],
    board: Noticeboard | None,
) -> None:
    told_since, said, cause = 0.0, 1, ""
    while (code := agent.poll()) is None:
        if asked() and not told_since:
            told_since = time.monotonic()
            agent.send_signal(signal.SIGTERM)
        if told_since and time.monotonic() - told_since > _GRACE_SECONDS:
            break
        if error := final_error(folder):
            raise error
        if told := _told(board, "error"):
            raise getattr(errors, told["kind"], TrainingError)(told["message"])
        attempts = _attempts(folder)
        attempts.check(job.max_restarts, cause)
        if attempts.total > said:
            say("restart", step=attempts.progress, why=cause)
            said = attempts.total
        cause = _cause(folder)  # as long as the workers' own notes of it are there
        time.sleep(_POLL_SECONDS)
    if error := final_error(folder):
        raise error
    if told_since:
        raise StoppedError(
            f"stopped behind the checkpoint of step {progress_in(folder)}, as asked. Run the same "
            "command again to go on."
        )
    if code:
        raise TrainingError(
            f"{_cause(folder)} Run the same command again: it resumes from the last checkpoint."
        )


def _attempts(folder: Path) -> Attempts:
    """The starts of the main worker so far."""
    starts = folder / STARTS
    attempts = Attempts()
    for line in starts.read_text().split() if starts.exists() else []:
        attempts = attempts.begin(int(line))
    return attempts


def _cause(folder: Path) -> str:
    """What ended the workers the last time, as they or the agent tell it."""
    log = folder / "agent.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    ended = re.findall(r"exitcode: (-?\d+)\) local_rank: (\d+)|Detected (\d+) new nodes", text)
    faults = sorted(folder.glob("fault-*.json"), key=lambda path: path.stat().st_mtime)
    told = f": {read_json(faults[-1])['message']}" if faults else ""
    logs = f" Its last words are in {folder}."
    if not ended:
        return f"the workers could not be started{told}.{logs}"
    if more := ended[-1][2]:
        return f"{more} more host{'s have' if int(more) > 1 else ' has'} come."
    code, rank = int(ended[-1][0]), ended[-1][1]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"worker {rank} {how}{told}.{logs}"


def _end(agent: subprocess.Popen[bytes]) -> None:
    """The agent's workers end when it does: each watches its parent."""
    if agent.poll() is None:
        agent.kill()
    agent.wait()
