"""One battery for every row of the launcher table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError, DataError, TrainingError
from pipeline.launch.base import Job, Launcher, num_workers_from_environment
from pipeline.launch.local import launch_local
from pipeline.launch.table import LAUNCHERS, launch
from tests.distributed.entries import Plan

CONTRACT: list[tuple[str, Launcher]] = [("local", launch_local)]
every = pytest.mark.parametrize(("name", "launcher"), CONTRACT)
ENTRIES = "tests.distributed.entries"


def test_the_battery_is_complete() -> None:
    assert dict(CONTRACT) == dict(LAUNCHERS)


@every
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_worker_runs_the_entry_with_one_thread(
    name: str, launcher: Launcher, num_workers: int, tmp_path: Path
) -> None:
    job = Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), num_workers)
    workers = launcher(job, tmp_path)
    assert [(rank, threads) for rank, threads, _ in workers] == [(r, 1) for r in range(num_workers)]
    assert len({pid for _, _, pid in workers} - {os.getpid()}) == num_workers


@every
@pytest.mark.parametrize(
    ("rank", "what", "kind", "expected"),
    [
        (1, "user error", DataError, r"^rank 1 met bad data\. Mend it\.$"),
        (1, "bug", TrainingError, r"worker 1 ended with status 3.*Its last words are in"),
        (0, "kill", TrainingError, r"worker 0 was killed by SIGKILL.*Run the same command again"),
        (1, "kill", TrainingError, r"worker 1 was killed by SIGKILL"),
        (1, "exit", TrainingError, r"worker 1 ended with status 9"),
    ],
)
def test_a_failure_names_its_worker_and_stops_the_others(
    name: str,
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


DRIVER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from pipeline.launch.base import Job
    from pipeline.launch.table import LAUNCHERS
    from tests.distributed.entries import Plan
    job = Job("tests.distributed.entries:hang_forever", Plan(rank=0, what=sys.argv[2]), 2)
    LAUNCHERS[sys.argv[1]](job, Path(sys.argv[2]) / "job")
    """
)


@every
def test_workers_do_not_outlive_a_killed_driver(
    name: str, launcher: Launcher, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, name, str(tmp_path)]) as driver:
        deadline = time.monotonic() + 60
        while len(pids := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(pids) == 2
        driver.send_signal(signal.SIGKILL)
    workers = [int(p.read_text()) for p in pids]
    deadline = time.monotonic() + 10
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
    monkeypatch.setenv("METALOOM_LAUNCHER", "cloud")
    with pytest.raises(ConfigError, match="METALOOM_LAUNCHER is 'cloud'.*local"):
        launch(f"{ENTRIES}:identify", Plan(rank=0, what=""), most=8)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_workers_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALOOM_NUM_WORKERS", value)
    with pytest.raises(ConfigError, match="METALOOM_NUM_WORKERS"):
        num_workers_from_environment(8)


def test_the_default_leaves_no_worker_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with more cores than groups; a number that was asked for is not touched."""
    monkeypatch.delenv("METALOOM_NUM_WORKERS", raising=False)
    monkeypatch.setattr("pipeline.launch.base.default_num_workers", lambda: 64)
    assert num_workers_from_environment(8) == 8
    monkeypatch.setenv("METALOOM_NUM_WORKERS", "64")
    assert num_workers_from_environment(8) == 64
