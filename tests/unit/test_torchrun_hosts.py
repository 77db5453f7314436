"""What a driver under torchrun asks of its hosts, and takes from its agent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.launch.base import Job
from pipeline.launch.network import free_endpoint
from pipeline.launch.torchrun import _serve, _wait, launch_torchrun
from pipeline.launch.torchrun_board import description
from pipeline.launch.torchrun_hosts import hosts_from_environment, shared_out, workers_left
from pipeline.launch.torchrun_story import Story
from pipeline.launch.worker import STARTS
from tests.distributed.entries import Plan

DEAF = "import signal, time; signal.signal(15, lambda *_: None); print(flush=True); time.sleep(0.5)"


@pytest.mark.parametrize(
    ("nodes", "asked", "cores", "here", "each"),
    [
        ("1:3", "", 8, 2, 3),  # the default shares the work out
        ("1:3", "4", 8, 4, 2),
        ("1:3", "6", 8, 6, 1),
        ("8", "", 64, 1, 1),
        ("1:2", "7", 8, 7, 1),
    ],
)
def test_hosts_that_join_bring_no_more_workers_than_there_is_work_for(
    nodes: str,
    asked: str,
    cores: int,
    here: int,
    each: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More of them would end the run for all."""
    monkeypatch.setenv("METALOOM_NODES", nodes)
    monkeypatch.setenv("METALOOM_RENDEZVOUS", "127.0.0.1:1")
    monkeypatch.setenv("METALOOM_NUM_WORKERS", asked)
    hosts = hosts_from_environment()
    num_workers = int(asked or min(cores, 8))
    job = shared_out(Job("e", Plan(rank=0, what=""), num_workers, most_workers=8), hosts)
    assert (job.num_workers, workers_left(job, hosts)) == (here, each)
    assert here + each * (hosts.most - 1) <= 8

    class Begun(Exception):  # noqa: N818 - no error
        pass

    def begin(joined: Job, *_: object, **__: object) -> None:
        raise Begun(joined.num_workers)

    monkeypatch.setattr("pipeline.launch.torchrun.start_agent", begin)
    told = description(job, hosts, "0123456789ab")
    told |= {"entry": "pipeline.x:y", "config_type": "pipeline.core.config:Section", "config": {}}
    for cores_there in (1, 99):
        with pytest.raises(Begun) as begun:
            _serve(told, hosts.rendezvous, cores_there, tmp_path / "run", lambda: False)
        assert begun.value.args[0] == min(cores_there, each)


@pytest.mark.parametrize(("nodes", "asked"), [("1:3", "7"), ("9", "1"), ("9", "")])
def test_hosts_that_would_have_nothing_to_do_are_refused_beforehand(
    nodes: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALOOM_NODES", nodes)
    monkeypatch.setenv("METALOOM_RENDEZVOUS", str(free_endpoint()))
    monkeypatch.setenv("METALOOM_NUM_WORKERS", asked)
    job = Job("e", Plan(rank=0, what=""), int(asked or 2), most_workers=8)
    with pytest.raises(ConfigError, match=r"without any: there is work for 8 in all\. Lower"):
        launch_torchrun(job, tmp_path)


def test_a_result_that_came_with_the_wish_to_stop_is_a_result(tmp_path: Path) -> None:
    """The agent had its last worker's good end before it heard the signal."""
    (tmp_path / STARTS).touch()
    (tmp_path / "result.json").write_text("1")
    agent = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    assert agent.stdout is not None and agent.stdout.readline()
    with agent.stdout:
        _wait(agent, tmp_path, Story(tmp_path, 0), lambda: True, None)
    assert agent.returncode == 0
