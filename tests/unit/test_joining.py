"""A group is made by all of its workers, or nobody waits for it without end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.processes import free_ports
from pipeline.runtime.context import SINGLE
from pipeline.runtime.faults import peers_watched

JOIN = """
import os, sys
from pipeline.runtime import context
from pipeline.runtime.faults import FaultError
context._START_SECONDS = 2.0
try:
    with context.worker_context():
        print("joined")
except FaultError as error:
    print(f"{type(error).__name__}: {error}")
sys.stdout.flush()
os._exit(0)  # a thread may wait for ever
"""


def join(rank: int, meeting: dict[str, str]) -> str:
    """What the one worker says that comes to a group of two."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", **meeting}
    environment["METALOOM_TIMEOUT_SECONDS"] = "1"
    command = [sys.executable, "-c", JOIN]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.timeout(90)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_does_not_come_is_named(rank: int, tmp_path: Path) -> None:
    said = join(rank, {"METALOOM_INIT": f"file://{tmp_path / 'meeting'}"})
    assert said == f"HungPeerError: worker {1 - rank} does not come within 2 s of the start\n"


@pytest.mark.timeout(90)
def test_a_worker_that_does_not_come_to_a_store_that_another_holds_is_named() -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    assert join(0, place) == "HungPeerError: worker 1 does not come within 2 s of the start\n"


@pytest.mark.timeout(90)
def test_nobody_waits_for_long_for_the_worker_that_holds_the_store() -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    assert "PeerError: the workers did not find each other: " in join(1, place)


def test_nothing_is_taken_for_a_lost_peer_where_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="by a daemon"), peers_watched(SINGLE):
        raise RuntimeError("Connection refused by a daemon")
