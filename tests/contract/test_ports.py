"""On which ports a run listens while it trains: loopback, but for the stores of torch's own (M5)."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from pipeline.launch.base import Job
from tests.contract.conftest import clusters_by_night
from tests.contract.drive import start
from tests.distributed.entries import Plan

_EVERYWHERE = {
    "local": 0,  # its workers meet in a file
    "torchrun": 2,  # the agent's rendezvous, and its workers' store
    "ray_train": 1,  # the first worker's store
    "kubernetes": 1,  # the same, in a pod
}
"""Sockets that take connections at all addresses, as torch's TCPStore does wherever it is bound."""


@clusters_by_night
def test_what_listens_while_a_run_trains(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    environment = {}
    if name == "ray_train":
        environment = request.getfixturevalue("ray_cluster").environment
    if name == "kubernetes":
        environment = request.getfixturevalue("training").environment
    plan = Plan(rank=0, what=str(tmp_path))
    driver = start(
        name, Job("tests.distributed.entries:hang_forever", plan, 2), tmp_path / "job", environment
    )
    try:
        deadline = time.monotonic() + 180
        while len(pids := list(tmp_path.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline, (tmp_path / "job" / "drive.log").read_text()
            time.sleep(0.05)
        ours = {driver.pid, *(int(pid.read_text()) for pid in pids)}
        ours |= {child.pid for child in psutil.Process(driver.pid).children(recursive=True)}
        found = [socket for pid in ours for socket in _listening(pid)]
    finally:
        driver.kill()
        driver.wait()
    own = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    everywhere = [address for address in found if address[0] not in own]
    assert len(found) >= 2, "gloo's, of each worker"
    assert {address for address, _ in everywhere} <= {"::", "0.0.0.0"}
    assert len(everywhere) == _EVERYWHERE[name], everywhere


def _listening(process: int) -> list[tuple[str, int]]:
    sockets = psutil.Process(process).net_connections(kind="inet")
    return [(s.laddr.ip, s.laddr.port) for s in sockets if s.status == "LISTEN"]
