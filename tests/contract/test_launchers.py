"""One battery for every row of the launcher table."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError, DataError, TrainingError
from pipeline.launch.base import Job, Launcher, num_workers_from_environment
from pipeline.launch.table import LAUNCHERS, _alone_with, launch
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store
from pipeline.training.meta_train import run as run_meta_training
from tests.contract.conftest import BY_NIGHT, ROWS, clusters_by_night, every_launcher
from tests.contract.drive import start
from tests.distributed.entries import Plan
from tests.distributed.small_run import digest, make_job

ENTRIES = "tests.distributed.entries"


def test_the_battery_is_complete() -> None:
    names = [row if isinstance(row, str) else row.values[0] for row in ROWS]
    assert names == ["local", "torchrun", "ray_train", "kubernetes"]
    assert set(names) == set(LAUNCHERS)


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [
        *(("local", workers) for workers in (1, 2, 3)),
        pytest.param("torchrun", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, marks=pytest.mark.slow),
        ("torchrun", 3),
        pytest.param("ray_train", 1, marks=BY_NIGHT),
        pytest.param("ray_train", 2, marks=pytest.mark.cluster),
        pytest.param("ray_train", 3, marks=BY_NIGHT),
        pytest.param("kubernetes", 1, marks=BY_NIGHT),
        pytest.param("kubernetes", 3, marks=BY_NIGHT),
    ],
)
def test_every_launcher_ends_with_the_same_bits(
    launcher: Launcher, num_workers: int, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """As a plain function call in this process, without any launcher."""
    plain = make_job(tmp_path / "plain", blob_store, blob_tasks, num_steps=12)
    metrics = run_meta_training(plain, SINGLE)
    job = make_job(tmp_path / "launched", blob_store, blob_tasks, num_steps=12)
    entry = "pipeline.training.meta_train:run"
    assert launcher(Job(entry, job, num_workers), tmp_path / "launch") == metrics
    assert digest(job) == digest(plain)


@clusters_by_night
def test_every_worker_runs_the_entry_with_one_thread(launcher: Launcher, tmp_path: Path) -> None:
    num_workers = 2
    job = Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), num_workers)
    workers = launcher(job, tmp_path)
    assert [(rank, threads) for rank, threads, _ in workers] == [(r, 1) for r in range(num_workers)]
    assert len({pid for _, _, pid in workers} - {os.getpid()}) == num_workers


FAILURES = [
    (1, "user error", DataError, r"^rank 1 met bad data\. Mend it\.$"),
    (1, "bug", TrainingError, r"worker 1 ended.*ZeroDivisionError: a mistake of ours"),
    (0, "kill", TrainingError, r"worker 0 (was killed|died).*Run the same command again"),
]
LOST = r"(lost their connections|worker \d ended).*: Connection refused by a daemon"
RAY = [BY_NIGHT, BY_NIGHT, [pytest.mark.cluster]]


@pytest.mark.parametrize(
    ("name", "rank", "what", "kind", "expected"),
    [
        *((name, *failure) for name in ("local", "torchrun") for failure in FAILURES),
        *((name, 0, "lost", TrainingError, LOST) for name in ("local", "torchrun")),
        *(pytest.param("ray_train", *f, marks=m) for f, m in zip(FAILURES, RAY, strict=True)),
        *(pytest.param("kubernetes", *f, marks=BY_NIGHT) for f in FAILURES),
    ],
)
def test_a_failure_names_its_worker_and_stops_the_others(
    launcher: Launcher,
    rank: int,
    what: str,
    kind: type[Exception],
    expected: str,
    tmp_path: Path,
) -> None:
    job = Job(f"{ENTRIES}:misbehave", Plan(rank=rank, what=what), 2)
    with pytest.raises(kind, match=expected):
        launcher(job, tmp_path)


@every_launcher
def test_workers_do_not_outlive_a_killed_driver(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    environment = {}
    if name == "kubernetes":
        pytest.skip("a driver that comes again finds its workers (test_kubernetes_launcher.py)")
    if name == "ray_train":
        environment = request.getfixturevalue("ray_cluster").environment
    job = Job(f"{ENTRIES}:hang_forever", Plan(rank=0, what=str(tmp_path)), 2)
    driver = start(name, job, tmp_path / "job", environment)
    deadline = time.monotonic() + 60
    while len(pids := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2, (tmp_path / "job" / "drive.log").read_text()
    driver.kill()
    driver.wait()
    workers = [int(p.read_text()) for p in pids]
    deadline = time.monotonic() + 30
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"  # a zombie waits for whoever adopted it, it does not run


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALOOM_NUM_WORKERS", "2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert len(launch(f"{ENTRIES}:identify", Plan(rank=0, what=""), most=8)) == 2
    assert not list(tmp_path.glob(".metaloom/launch/*")), "a finished run leaves nothing"
    failed = [tmp_path / f".metaloom/launch/run-{number}" for number in range(12)]
    for age, folder in enumerate(failed):
        folder.mkdir()
        os.utime(folder, (age, age))
    launch(f"{ENTRIES}:identify", Plan(rank=0, what=""), most=8)
    assert [folder for folder in failed if folder.exists()] == failed[2:], (
        "the last ten failed ones"
    )
    for late in ("run-98", "run-99"):
        (tmp_path / ".metaloom/launch" / late).mkdir()
    with _alone_with(failed[2]):
        launch(f"{ENTRIES}:identify", Plan(rank=0, what=""), most=8)
    assert [folder for folder in failed if folder.exists()] == [failed[2], *failed[4:]], (
        "the folder of a launch that runs stays"
    )
    monkeypatch.setenv("METALOOM_LAUNCHER", "cloud")
    with pytest.raises(ConfigError, match="METALOOM_LAUNCHER is 'cloud'.*local"):
        launch(f"{ENTRIES}:identify", Plan(rank=0, what=""), most=8)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "4:2", "2:", ":3", "1:2:3"])
def test_a_wrong_number_of_workers_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALOOM_NUM_WORKERS", value)
    with pytest.raises(ConfigError, match="METALOOM_NUM_WORKERS"):
        num_workers_from_environment(8)


def test_the_default_leaves_no_worker_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with more cores than groups; a number that was asked for is not touched."""
    monkeypatch.delenv("METALOOM_NUM_WORKERS", raising=False)
    monkeypatch.setattr("pipeline.launch.base.default_num_workers", lambda: 64)
    assert num_workers_from_environment(8) == (None, 8)
    monkeypatch.setenv("METALOOM_NUM_WORKERS", "64")
    assert num_workers_from_environment(8) == (None, 64)
    monkeypatch.setenv("METALOOM_NUM_WORKERS", "2:4")
    assert num_workers_from_environment(8) == (2, 4)
