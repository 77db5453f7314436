"""torchrun over several hosts, each with its own address and its own disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.launch.base import Job
from pipeline.runtime.checkpoint import newest_step
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
_PORT, _NUM_STEPS = 29777, 900


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with make_hosts(3, tmp_path / "hosts") as made:
        yield made


def _furnish(host: Host, store: Store, tasks: Path) -> MetaTrainJob:
    """The same data on each disk, under the same relative paths."""
    shutil.copytree(store.folder, host.folder / "store")
    shutil.copytree(tasks, host.folder / "tasks")
    job = long_job(host.folder, store, tasks, num_steps=_NUM_STEPS)
    inside = {
        name: getattr(job, name).relative_to(host.folder)
        for name in ("pretrained", "target", "checkpoints", "journal", "choices")
    }
    return job.model_copy(update={"store": Path("store"), "tasks": Path("tasks"), **inside})


def _environment(driver: Host, num_workers: int) -> dict[str, str]:
    return {
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
        "METALOOM_NODES": "1:2",
        "METALOOM_NUM_WORKERS": str(num_workers),
        "METALOOM_RENDEZVOUS": f"{driver.address}:{_PORT}",
        "METALOOM_TIMEOUT_SECONDS": "5",
    }


def _join(host: Host, driver: Host, num_workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "join", f"{driver.address}:{_PORT}"]
    return host.run(command, host.folder / "join.log", _environment(driver, num_workers))


@contextmanager
def _ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens, they do not go on."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


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
    told = re.findall(r"global_world_sizes=\[(\d+)", text)
    return [int(size) for size in told]


def test_hosts_are_cut_off_come_back_and_leave(
    hosts: list[Host],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    campaign: Callable[[str], Campaign],
) -> None:
    """Worlds of 4, 2, 4 and 3 workers in one run: the bits of an undisturbed one."""
    found = campaign("a host cut off from the network, torchrun")
    found.most_lost = CHECKPOINT_EVERY
    metrics, bits = undisturbed(
        tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=_NUM_STEPS
    )
    first, second, third = hosts
    job, _, _ = [_furnish(host, blob_store, blob_tasks) for host in hosts]
    joined = [_join(second, first, 2)]
    folder = first.folder / "run"
    write_drive("torchrun", Job(ENTRY, job, 2, max_restarts=3), folder)
    command = [sys.executable, "-m", "tests.contract.drive", str(folder)]
    log = first.folder / "driver.log"
    driver = first.run(command, log, _environment(first, 2))

    def wait_for(world: int) -> list[int]:
        """Until workers of this world have got on; returns the steps so far."""
        _wait(lambda: _worlds(first)[-1:] == [world], driver, log)
        before = len(_steps(first))
        _wait(lambda: len(_steps(first)) > before + CHECKPOINT_EVERY + 2, driver, log)
        return _steps(first)

    with _ended([driver, *joined]):
        before = wait_for(4)
        second.cut_off()
        begin, cut = time.monotonic(), time.time()
        _wait(lambda: len(_steps(first)) > len(before) + 40, driver, log)
        seconds = time.monotonic() - begin
        resumed_at = _resumed_at(first, max(before), cut)
        wait_for(2)
        second.connect()
        wait_for(4)
        joined[0].terminate()
        assert joined[0].wait(60) == 0, "a host that leaves in peace"
        joined.append(_join(third, first, 1))
        with _ended(joined[1:]):
            wait_for(3)
            result = outcome(driver, folder)
    assert newest_step(first.folder / "checkpoints") == _NUM_STEPS
    assert not newest_step(third.folder / "checkpoints"), "one copy is enough at the end"
    own = job.model_copy(
        update={name: first.folder / getattr(job, name) for name in ("target", "checkpoints")}
    )
    worlds = [
        world for world, _ in groupby(_worlds(first))
    ]  # with the driver alone at first, or not
    begun = worlds.index(4)
    assert worlds[begun : begun + 3] == [4, 2, 4] and worlds[-1] == 3
    found.add(
        Try(
            progress=len(before),
            survived=result == metrics,
            bits_equal=digest(own) == bits,
            steps_lost=max(before) - resumed_at,
            seconds=seconds,
        )
    )


@pytest.mark.slow
def test_the_drivers_host_dies_and_the_same_command_goes_on(
    hosts: list[Host],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    campaign: Callable[[str], Campaign],
) -> None:
    """The rendezvous dies with it; the host that has joined waits for the next one."""
    found = campaign("kill -9 of the driver of two hosts, torchrun")
    found.most_lost = CHECKPOINT_EVERY
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=_NUM_STEPS)
    first, second, _ = hosts
    job, _ = [_furnish(host, blob_store, blob_tasks) for host in (first, second)]
    folder, log = first.folder / "run", first.folder / "driver.log"

    def begin() -> subprocess.Popen[bytes]:
        write_drive("torchrun", Job(ENTRY, job, 2, max_restarts=3), folder)
        command = [sys.executable, "-m", "tests.contract.drive", str(folder)]
        return first.run(command, log, {**_environment(first, 2), "METALOOM_NODES": "2"})

    driver = begin()
    with _ended([driver, _join(second, first, 2)]):
        _wait(lambda: len(_steps(first)) > 2 * CHECKPOINT_EVERY, driver, log)
        driver.kill()
        driver.wait()
        before, killed, cut = _steps(first), time.monotonic(), time.time()
        driver = begin()
        with _ended([driver]):
            _wait(lambda: len(_steps(first)) > len(before) + CHECKPOINT_EVERY, driver, log)
            seconds = time.monotonic() - killed
            resumed_at = _resumed_at(first, max(before), cut)
            result = outcome(driver, folder)
    own = job.model_copy(
        update={name: first.folder / getattr(job, name) for name in ("target", "checkpoints")}
    )
    equal = (result, digest(own)) == expected
    lost = max(before) - resumed_at
    found.add(Try(len(before), survived=True, bits_equal=equal, steps_lost=lost, seconds=seconds))


def test_other_data_on_a_host_is_refused(
    hosts: list[Host], blob_store: Store, blob_tasks: Path, other_store: Store
) -> None:
    first, second, _ = hosts
    job = _furnish(first, blob_store, blob_tasks)
    _furnish(second, other_store, blob_tasks)
    joiner = _join(second, first, 1)
    folder = first.folder / "run"
    write_drive("torchrun", Job(ENTRY, job, 1, max_restarts=3), folder)
    environment = {**_environment(first, 1), "METALOOM_NODES": "2"}
    command = [sys.executable, "-m", "tests.contract.drive", str(folder)]
    driver = first.run(command, first.folder / "driver.log", environment)
    with (
        _ended([driver, joiner]),
        pytest.raises(PipelineError, match="not hold the same data.*store"),
    ):
        outcome(driver, folder)


@pytest.fixture
def other_store(tmp_path: Path) -> Store:
    from tests.conftest import write_blob_store

    return write_blob_store(tmp_path / "other", seed=1)
