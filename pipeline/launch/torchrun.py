"""Workers under torchrun's agents, on one host or many that come and go.

The driver's host runs the first agent, which holds the rendezvous; other hosts run `metaloom join
HOST:PORT`, which learns the job from there. Ranks are torchrun's; the main worker is the first one
of the driver's host, so that what it leaves is where DVC looks for it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import ConfigError, MachineError, TrainingError
from pipeline.core.files import read_json
from pipeline.launch.base import Job, num_workers_from_environment
from pipeline.launch.local import (
    STOP_SECONDS,
    did_not_stop,
    final_error,
    prepare,
    progress_in,
    stop_asked,
    stopped_as_asked,
)
from pipeline.launch.network import Endpoint, parse_endpoint, require_free
from pipeline.launch.torchrun_board import Announcement, description, is_open
from pipeline.launch.torchrun_hosts import (
    MANY,
    Hosts,
    end_agent,
    hosts_from_environment,
    shared_out,
    start_agent,
)
from pipeline.launch.torchrun_story import (
    AGENT_LOG,
    Story,
    agents_last_words,
    how_it_ended,
)
from pipeline.launch.worker import HEARD, STARTS, resolve
from pipeline.runtime.lineage import code_hash, code_root
from pipeline.runtime.logs import say
from pipeline.runtime.noticeboard import Noticeboard, SilentError

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_PATIENCE_SECONDS = 15.0
"""For the noticeboard; no signal is heard meanwhile."""
_GAVE_UP, _SIGNALS = 2, 128
"""How torchrun's agent ends, beside 1: it could not go on itself; by a signal, added to that."""


class _LostAgentError(Exception):
    """The agent was ended by somebody else: how."""


def launch_torchrun(job: Job, folder: Path) -> Any:
    """Start this host's agent and wait; workers that die, or hosts that come or go, start all anew.

    METALOOM_NODES says how many hosts (`2`, or elastic `1:3`; default 1), METALOOM_RENDEZVOUS where
    this one listens for the others (host:port). METALOOM_NUM_WORKERS is the number on this host; on
    the others it is what they are set to, or less where there is not work for so many.

    Raises:
        PipelineError: a worker's own; or too many starts came to nothing.
        StoppedError: this process was asked to stop, and the workers did.
    """
    hosts = hosts_from_environment()
    job = shared_out(job, hosts)
    require_free(hosts.rendezvous)
    prepare(job, folder)
    (folder / AGENT_LOG).unlink(missing_ok=True)
    story = Story(folder, job.max_restarts)
    with stop_asked() as asked:
        while True:
            try:
                _run_agent(job, folder, hosts, story, asked)
                return read_json(folder / "result.json")
            except _LostAgentError as lost:
                _require_another_agent(job, hosts, str(lost))
                story.lost_agent(str(lost))
                hosts = hosts_from_environment()
                require_free(hosts.rendezvous)


def _run_agent(
    job: Job, folder: Path, hosts: Hosts, story: Story, asked: Callable[[], bool]
) -> None:
    """From an agent's start to its end; its workers have ended then."""
    run = uuid.uuid4().hex[:12]
    agent = start_agent(job, folder, hosts, run, is_main=True)
    try:
        if hosts.most == 1:
            _wait(agent, folder, story, asked, None)
            return
        told = description(job, hosts, run)
        board = Announcement(hosts.rendezvous, told, lambda: agent.poll() is None)
        try:
            _wait(agent, folder, story, asked, board)
        finally:
            board.close()
    finally:
        end_agent(agent)


def _require_another_agent(job: Job, hosts: Hosts, lost: str) -> None:
    if hosts.most > 1:
        lost += " The rendezvous of all hosts has ended with it."
    elif job.max_restarts:
        return
    raise TrainingError(f"{lost} Run the same command again: it resumes from the last checkpoint.")


def join_runs(rendezvous: str, folder: Path, *, once: bool = False) -> None:
    """Serve as one more host of the runs that a driver announces, one after the other.

    Args:
        rendezvous: host:port of the driver.
        folder: for what the workers of the runs write.
        once: end with the first run.

    Raises:
        ConfigError: that is no address, or the driver runs other code than this host has.
        MachineError: what listens there is no driver.
    """
    endpoint = parse_endpoint(rendezvous)
    _, num_workers = num_workers_from_environment(MANY)
    say("join", waiting_for=str(endpoint), workers=float(num_workers))
    last = ""
    with stop_asked() as asked:
        while not asked():
            told = _next_job(endpoint, last)
            if told is None:
                time.sleep(_POLL_SECONDS)
                continue
            last = told["run"]
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
        mend = "Check out the same commit on both, then run `metaloom join` again."
        _tell(endpoint, "refused", f"{socket.gethostname()} has other code than this host. {mend}")
        raise ConfigError(f"the driver at {endpoint} runs other code than this host has. {mend}")
    ours = told["entry"].startswith("pipeline.") and told["config_type"].startswith("pipeline.")
    if not ours or not re.fullmatch(r"[0-9a-f]{12}", told["run"]):
        raise ConfigError(f"{endpoint} announces {told['entry']!r}, which is no run of ours.")
    config = resolve(told["config_type"]).model_validate(told["config"])
    job = Job(told["entry"], config, min(num_workers, max(1, int(told["workers"]))))
    say("join", run=told["run"], entry=told["entry"], workers=float(job.num_workers))
    prepare(job, folder)
    hosts = Hosts(told["least"], told["most"], endpoint)
    agent = start_agent(job, folder, hosts, told["run"], is_main=False)
    try:
        while agent.poll() is None:
            if asked():
                agent.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    agent.wait(STOP_SECONDS + _GRACE_SECONDS)
                return
            if error := final_error(folder):
                told_error = {"kind": type(error).__name__, "message": str(error)}
                _tell(endpoint, "error", told_error)
                return
            time.sleep(_POLL_SECONDS)
        if not agent.returncode:
            shutil.rmtree(folder)  # kept when the run failed: it holds the workers' logs
    finally:
        end_agent(agent)


def _tell(endpoint: Endpoint, name: str, what: Any) -> None:
    with contextlib.suppress(MachineError):  # a driver that has gone needs no telling
        Noticeboard.connect(*endpoint, patience=_PATIENCE_SECONDS).put(name, what)


def _next_job(endpoint: Endpoint, last: str) -> dict[str, Any] | None:
    """What the driver wants done, if there is one with a job that is not the last one.

    Raises:
        MachineError: what listens there is no driver, nor ever was.
    """
    if not is_open(endpoint):
        return None
    try:
        told: dict[str, Any] | None = Noticeboard.connect(
            *endpoint, patience=_PATIENCE_SECONDS
        ).get("job")
    except SilentError:
        if last:
            return None
        raise
    except MachineError:  # the run has just ended
        return None
    return told if told and told["run"] != last else None


def _wait(
    agent: subprocess.Popen[bytes],
    folder: Path,
    story: Story,
    asked: Callable[[], bool],
    board: Announcement | None,
) -> None:
    """Tell what happens until the agent has ended, well or because it was asked to.

    Raises:
        PipelineError: whatever no new start would mend.
        StoppedError: as was asked.
        _LostAgentError: nobody here had asked the agent to end.
    """
    told_since = 0.0
    while agent.poll() is None:
        if asked() and not told_since:
            told_since = time.monotonic()
            agent.send_signal(signal.SIGTERM)
        if told_since and time.monotonic() - told_since > STOP_SECONDS + _GRACE_SECONDS:
            break
        if error := final_error(folder):
            raise error
        if board and board.answer:
            told = board.answer
            raise getattr(errors, told["kind"], TrainingError)(told["message"])
        if board and board.failure:
            raise MachineError(board.failure)
        story.tell()
        time.sleep(_POLL_SECONDS)
    if error := final_error(folder):
        raise error
    if agent.returncode == 0 and (folder / "result.json").exists():
        return  # the wish to stop came with the last step
    if told_since:
        heard = (folder / HEARD).exists() or not (folder / STARTS).exists()
        step = progress_in(folder)
        raise stopped_as_asked(step) if heard else did_not_stop(step)
    if agent.returncode:
        raise _failed(agent.returncode, folder, story, alone=board is None)


def _failed(status: int, folder: Path, story: Story, *, alone: bool) -> Exception:
    again = "Run the same command again: it resumes from the last checkpoint."
    if status < 0 or status > _SIGNALS:
        number = status if status < 0 else _SIGNALS - status
        return _LostAgentError(f"torchrun's agent {how_it_ended(number)}.")
    if status == _GAVE_UP:
        how = f"torchrun's agent ended: {agents_last_words(folder)}. Its log is"
        how += f" {folder / AGENT_LOG}."
        # Of one host it is mostly the port: somebody else took it since it was found to be free.
        return _LostAgentError(how) if alone else MachineError(f"{how} {again}")
    return TrainingError(f"{story.cause()} {again}")
