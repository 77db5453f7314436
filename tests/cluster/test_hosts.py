"""torchrun over several hosts, each with its own address and its own disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.launch.base import Job
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.chaos.campaign import Campaign, Try
from tests.chaos.conftest import campaign as campaign
from tests.chaos.disturbed import CHECKPOINT_EVERY, ENTRY, long_job, undisturbed
from tests.cluster.hosts import Host, make_hosts
from tests.contract.drive import REPOSITORY, outcome, write_drive
from tests.distributed.small_run import digest

pytestmark = pytest.mark.timeout(600)
_PORT = 29777


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with make_hosts(2, tmp_path / "hosts") as made:
        yield made


def _furnish(host: Host, store: Store, tasks: Path) -> MetaTrainJob:
    """The same data on each disk, under the same relative paths."""
    shutil.copytree(store.folder, host.folder / "store")
    shutil.copytree(tasks, host.folder / "tasks")
    job = long_job(host.folder, store, tasks, num_steps=600)
    inside = {
        name: getattr(job, name).relative_to(host.folder)
        for name in ("pretrained", "target", "checkpoints", "journal", "choices")
    }
    return job.model_copy(update={"store": Path("store"), "tasks": Path("tasks"), **inside})


def _environment(driver: Host) -> dict[str, str]:
    return {
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
        "METALOOM_NODES": "1:2",
        "METALOOM_NUM_WORKERS": "1",
        "METALOOM_RENDEZVOUS": f"{driver.address}:{_PORT}",
        "METALOOM_TIMEOUT_SECONDS": "5",
    }


def _join(host: Host, driver: Host) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "join", f"{driver.address}:{_PORT}"]
    return host.run(command, host.folder / "join.log", _environment(driver))


def _steps(host: Host) -> list[int]:
    return [point.step for point, _ in read_points(host.folder / "journal.jsonl")]


def _resumed_at(host: Host, reached: int, cut: float) -> int:
    """The checkpoint that the run went on from; steps that are told again have their old times."""
    points = [point for point, _ in read_points(host.folder / "journal.jsonl")]
    done = [point.step for point in points if point.time > cut and point.step <= reached]
    return done[0] - 1 if done else reached


def _wait(what: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def _worlds(host: Host) -> list[int]:
    """The sizes of the worlds that the driver's agent has started workers in."""
    log = host.folder / "run" / "launch" / "agent.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return [
        int(line.partition("global_world_sizes=[")[2].partition(",")[0].rstrip("]"))
        for line in text.splitlines()
        if "global_world_sizes=[" in line
    ]


def test_a_host_is_cut_off_and_comes_back(
    hosts: list[Host],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    campaign: Callable[[str], Campaign],
) -> None:
    """Worlds of 2, 1 and 2 workers in one run: the bits of an undisturbed one."""
    found = campaign("a host cut off from the network, torchrun")
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=600)
    first, second = hosts
    job = _furnish(first, blob_store, blob_tasks)
    _furnish(second, blob_store, blob_tasks)
    joiner = _join(second, first)
    folder = first.folder / "run"
    write_drive("torchrun", Job(ENTRY, job, 1, max_restarts=3), folder)
    command = [sys.executable, "-m", "tests.contract.drive", str(folder)]
    log = first.folder / "driver.log"
    driver = first.run(command, log, _environment(first))
    try:
        _wait(
            lambda: len(_steps(first)) > CHECKPOINT_EVERY + 2 and 2 in _worlds(first), driver, log
        )
        before = _steps(first)
        second.cut_off()
        begin, cut = time.monotonic(), time.time()
        _wait(lambda: len(_steps(first)) > len(before) + 40, driver, log)
        alone = _worlds(first)[-1]
        seconds = time.monotonic() - begin
        resumed_at = _resumed_at(first, max(before), cut)
        second.connect()
        _wait(lambda: _worlds(first)[-1] == 2, driver, log)
        result = outcome(driver, folder)
    finally:
        for process in (driver, joiner):
            if process.poll() is None:
                process.kill()
            process.wait()
    own = job.model_copy(
        update={name: first.folder / getattr(job, name) for name in ("target", "checkpoints")}
    )
    found.add(
        Try(
            progress=len(before),
            survived=alone == 1 and result == metrics,
            bits_equal=digest(own) == bits,
            steps_lost=max(before) - resumed_at,
            seconds=seconds,
        )
    )
    assert max(before) - resumed_at <= CHECKPOINT_EVERY


def test_other_data_on_a_host_is_refused(
    hosts: list[Host], blob_store: Store, blob_tasks: Path, other_store: Store
) -> None:
    first, second = hosts
    job = _furnish(first, blob_store, blob_tasks)
    _furnish(second, other_store, blob_tasks)
    joiner = _join(second, first)
    folder = first.folder / "run"
    write_drive("torchrun", Job(ENTRY, job, 1, max_restarts=3), folder)
    environment = {**_environment(first), "METALOOM_NODES": "2"}
    command = [sys.executable, "-m", "tests.contract.drive", str(folder)]
    driver = first.run(command, first.folder / "driver.log", environment)
    try:
        with pytest.raises(PipelineError, match="not hold the same data.*store"):
            outcome(driver, folder)
    finally:
        for process in (driver, joiner):
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def other_store(tmp_path: Path) -> Store:
    from tests.conftest import write_blob_store

    return write_blob_store(tmp_path / "other", seed=1)
