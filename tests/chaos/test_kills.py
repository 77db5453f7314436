"""kill -9, SIGTERM and SIGSTOP at random steps: the bits of a run that nothing disturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import StoppedError
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, is_full, tries
from tests.chaos.disturbed import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    VALIDATE_EVERY,
    Disturbed,
    disturb,
    kill_worker,
    long_job,
    told_of,
    undisturbed,
)
from tests.distributed.broken import Slow
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(7200)]
torchrun_by_night = pytest.param("torchrun", marks=pytest.mark.slow)
ray_by_night = pytest.param("ray_train", marks=pytest.mark.slow)

KILL_EVERY_SECONDS = 180
RAY_PRINTS_SECONDS = 2.0
"""What the workers and the controller of Ray print reaches the driver's log after a while."""
NEVER = 1_000_000

Begin = Callable[..., Disturbed]
"""(name, number of workers, **changes of the job) -> a run that was started"""


@pytest.fixture
def environment(launcher: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """The way to the cluster, for the launcher that needs one."""
    if launcher != "ray_train":
        return {}
    found: dict[str, str] = request.getfixturevalue("ray_cluster").environment
    return found


@pytest.fixture
def begin(
    launcher: str,
    environment: dict[str, str],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> Begin:
    def start(name: str, workers: int, **changes: Any) -> Disturbed:
        job = long_job(tmp_path / name, blob_store, blob_tasks, **changes)
        run = Disturbed(job, launcher, environment=environment)
        run.start(workers)
        return run

    return start


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("local", "a worker"),
        ("local", "rank 0"),
        ("torchrun", "a worker"),
        pytest.param("torchrun", "rank 0", marks=pytest.mark.slow),
        ("ray_train", "a worker"),
        pytest.param("ray_train", "rank 0", marks=pytest.mark.slow),
    ],
)
def test_kill_9(
    launcher: str,
    victim: str,
    begin: Begin,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Each step is in the driver's journal at the end, from however many groups of workers."""
    found = campaign(f"kill -9 of {victim}, {launcher}")
    found.most_lost = CHECKPOINT_EVERY
    found.most_noticed = 1.0 + RAY_PRINTS_SECONDS * (launcher == "ray_train")
    wanted = tries(ci=3, full=30) if launcher == "local" else tries(ci=1, full=6)
    rank = 0 if victim == "rank 0" else None
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(f"{launcher} {victim}")
    runs: list[Disturbed] = []

    def start(name: str) -> Disturbed:
        runs.append(begin(name, 2 if launcher == "ray_train" else rng.choice([2, 3])))
        return runs[-1]

    disturb(found, wanted, start, lambda run: kill_worker(run, rng, rank), expected)
    for run in runs:
        steps = {point.step for point, _ in read_points(run.job.journal)}
        assert steps == set(range(1, NUM_STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun", "ray_train"])
def test_nine_tenths_of_the_time_are_useful_at_one_kill_in_three_minutes(
    launcher: str,
    begin: Begin,
    campaign: Callable[[str], Campaign],
    tmp_path: Path,
) -> None:
    """Useful is all time but that from each kill until the step that it had reached is done again.

    The run is longer than the test, which ends it; the bits are the other campaigns' affair.
    """
    found = campaign(f"one kill in three minutes, {launcher}")
    pause = tries(ci=30, full=KILL_EVERY_SECONDS)
    run = begin("run", 2, num_steps=NEVER, validate_every=NEVER)
    rng, wasted = random.Random(launcher), 0.0
    assert run.wait_for_steps(CHECKPOINT_EVERY)
    since = time.monotonic()
    for kill in range(1, tries(ci=2, full=3) + 1):
        time.sleep(max(0.0, since + kill * pause - time.monotonic()))
        reached = max(run.steps())
        outcome = kill_worker(run, rng, None)
        assert outcome is not None and outcome.seconds is not None
        begun = time.monotonic()
        while max(run.steps(), default=0) < reached:
            assert run.is_running(), run.log()
            time.sleep(0.01)
        wasted += outcome.seconds + time.monotonic() - begun
        found.add(outcome)
    useful = 1 - wasted / (time.monotonic() - since)
    run.kill(run.tree())
    found.notes["goodput"] = round(useful, 3)
    assert useful >= 0.9 or not is_full(), useful


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("local", "the driver"),
        ("local", "the whole node"),
        pytest.param("torchrun", "the driver", marks=pytest.mark.slow),
        pytest.param("ray_train", "the driver", marks=pytest.mark.slow),
    ],
)
def test_the_same_command_again_after_the_driver_or_the_node_was_killed(
    launcher: str,
    victim: str,
    begin: Begin,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Started again with other numbers of workers: 4, then 2, then 3.

    Ray has no snapshot of a run that could be torn: each start is a run of its own to it.
    """
    found = campaign(f"kill -9 of {victim}, {launcher}")
    found.most_lost = CHECKPOINT_EVERY
    one = victim == "the whole node"
    wanted = tries(ci=1 if one else 2, full=15 if launcher == "local" else 5)
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng, sizes = random.Random(victim), [2, 3, 4] if launcher == "local" else [2, 3, 1]

    def kill(run: Disturbed) -> Try | None:
        if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
            return None
        assert run.driver is not None
        run.kill([run.driver.pid] if victim == "the driver" else run.tree())
        run.driver.wait()
        while victim == "the driver" and run.workers():
            time.sleep(0.05)  # they notice that they are alone
        kept = {path.name for path in run.folder.glob("launch/ray/**/*") if path.is_file()}
        assert kept == ({".validate_storage_marker"} if launcher == "ray_train" else set())
        before = run.steps()
        run.start(sizes[len(before) % 3])
        lost, seconds = run.wait_until_it_goes_on(before)
        if lost is None:
            return None
        return Try(progress=len(before), survived=True, steps_lost=lost, seconds=seconds)

    disturb(found, wanted, lambda name: begin(name, 2 + 2 * (launcher == "local")), kill, expected)


@pytest.mark.parametrize("launcher", ["local", torchrun_by_night, ray_by_night])
def test_sigterm_loses_nothing(
    launcher: str,
    begin: Begin,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    found = campaign(f"SIGTERM, {launcher}")
    found.most_lost = 0
    wanted = tries(ci=2, full=30) if launcher == "local" else tries(ci=1, full=10)
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(launcher)

    def stop(run: Disturbed) -> Try | None:
        if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
            return None
        time.sleep(rng.uniform(0, 0.02))
        assert run.driver is not None
        asked = time.monotonic()
        run.driver.send_signal(signal.SIGTERM)
        try:
            run.end()
            return None  # the last step was done before the signal was heard
        except StoppedError as error:
            said = str(error)
        seconds = time.monotonic() - asked
        before = run.steps()
        assert f"step {run.kept()}, as asked" in said
        survived = seconds < 10 and not run.workers()
        run.start(rng.choice([1, 2, 3]))
        lost = max(before) - run.kept()
        return Try(progress=len(before), survived=survived, steps_lost=lost, seconds=seconds)

    disturb(found, wanted, lambda name: begin(name, 2), stop, expected)


@pytest.mark.parametrize("launcher", ["local", torchrun_by_night, ray_by_night])
def test_sigterm_in_a_validation_loses_nothing(
    launcher: str,
    environment: dict[str, str],
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Which takes some seconds on one worker; the next start does it again."""
    found = campaign(f"SIGTERM in a validation, {launcher}")
    found.most_lost = 0
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    begun = tmp_path / "begun"

    def begin(name: str) -> Disturbed:
        job = long_job(tmp_path / name, blob_store, blob_tasks)
        seconds = 5.0 if launcher == "ray_train" else 2.0  # its workers hear of a signal later
        plan = Slow(job=job, rank=1, seconds=seconds, what="validation", begun=begun)
        entry = "tests.distributed.broken:slowed"
        run = Disturbed(job, launcher, entry=entry, plan=plan, environment=environment)
        run.start(2)
        return run

    def stop(run: Disturbed) -> Try | None:
        while not begun.exists():
            assert run.is_running(), run.log()
            time.sleep(0.05)
        assert run.driver is not None
        asked = time.monotonic()
        run.driver.send_signal(signal.SIGTERM)
        with pytest.raises(StoppedError, match=f"checkpoint of step {VALIDATE_EVERY}, as asked"):
            run.end()
        seconds, before = time.monotonic() - asked, run.steps()
        assert len(before) == VALIDATE_EVERY
        told = {name for point, _ in read_points(run.job.journal) for name in point.metrics}
        survived = "val_accuracy" not in told and not run.workers()
        run.start(2)
        lost = max(before) - run.kept()
        return Try(len(before), survived=survived, steps_lost=lost, seconds=seconds)

    disturb(found, 1, begin, stop, expected)


@pytest.mark.parametrize("launcher", ["local", torchrun_by_night, ray_by_night])
def test_a_stopped_worker_is_named_and_the_run_goes_on(
    launcher: str,
    environment: dict[str, str],
    begin: Begin,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """All other workers write the stacks of their threads."""
    found = campaign(f"SIGSTOP of a worker, {launcher}")
    found.most_lost = CHECKPOINT_EVERY
    timeout = 4.0
    # torchrun's and Ray's workers meet at the first one: whether that one lives takes a bit longer.
    found.most_noticed = timeout + (1.0 if launcher == "local" else 2.0)
    found.most_noticed += RAY_PRINTS_SECONDS * (launcher == "ray_train")
    environment["METALOOM_TIMEOUT_SECONDS"] = str(timeout)
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng, stops = random.Random(11), list[int]()

    def stop(run: Disturbed) -> Try | None:
        if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
            return None
        while not (workers := run.workers()):
            time.sleep(0.05)
        rank = rng.choice(sorted(workers)) if stops else 0  # who may hold the workers' store
        stops.append(rank)
        before, told = run.steps(), len(found_out(run))
        logged = _sizes(run)
        stopped = time.monotonic()
        os.kill(workers[rank], signal.SIGSTOP)
        while len(found_out(run)) == told:
            assert time.monotonic() - stopped < 60, run.log()
            if not run.is_running():
                return None
            time.sleep(0.02)
        detected = time.monotonic() - stopped
        named = re.search(r"worker (\d+) does not answer", found_out(run)[-1])
        stacks = _stacks(run, workers, logged) >= set(workers) - {rank}
        lost, _ = run.wait_until_it_goes_on(before)
        if lost is None:
            return None
        survived = named is not None and int(named[1]) == rank and stacks
        return Try(len(before), survived, steps_lost=lost, noticed=detected)

    def start(name: str) -> Disturbed:
        return begin(name, rng.choice([2, 3, 4]) if launcher == "local" else 2)

    wanted = tries(ci=1, full=25) if launcher == "local" else tries(ci=1, full=6)
    disturb(found, wanted, start, stop, expected)
    found.notes["timeout"] = timeout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_worker_that_is_stopped_before_it_joins_is_named(
    launcher: str, begin: Begin, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """While it imports its libraries; the others wait for it for a minute, and all start again."""
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    run = begin("run", 2)
    while 1 not in (workers := run.workers()):
        assert run.is_running(), run.log()
    os.kill(workers[1], signal.SIGSTOP)
    while not run.faults_told():
        assert run.is_running(), run.log()
        time.sleep(0.1)
    assert not run.steps()
    assert "worker 1 does not come within 60 s of the start" in run.faults_told()[0]
    assert (run.end(), digest(run.job)) == expected


def found_out(run: Disturbed) -> list[str]:
    """What was said of faults so far, or of other starts."""
    faults = [str(line["why"]) for line in told_of("fault", run.log())]
    return faults or run.restarts_told()


def _logs(run: Disturbed, rank: int) -> list[Path]:
    """Where a worker writes: the main one, and all of Ray's, into the driver's log."""
    launch = run.folder / "launch"
    own = [launch / f"worker-{rank}.log", *launch.glob(f"logs/**/{rank}/stderr.log")]
    return [log for log in own if log.exists()] or [run.folder / "drive.log"]


def _sizes(run: Disturbed) -> dict[Path, int]:
    return {log: log.stat().st_size for log in run.folder.rglob("*.log")}


def _stacks(run: Disturbed, workers: dict[int, int], since: dict[Path, int]) -> set[int]:
    """The workers that have written their stacks since their logs had these sizes."""
    found = set()
    for rank, process in workers.items():
        new = [log.read_bytes()[since.get(log, 0) :] for log in _logs(run, rank)]
        lines = b"".join(new).decode(errors="replace").splitlines()
        if any("(RayTrainWorker" in line for line in lines):
            lines = [line for line in lines if f"pid={process}" in line]
        text = " ".join(lines)
        found |= {rank} if "Thread 0x" in text and "in optimise" in text else set()
    return found


def test_without_checkpoints_the_campaign_fails(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """The guard switched off: a killed run then loses more than one interval."""
    job = long_job(tmp_path / "run", blob_store, blob_tasks, checkpoint_every=NEVER)
    run = Disturbed(job, "local")
    run.start(2)
    assert run.wait_for_steps(2 * CHECKPOINT_EVERY)
    before = run.steps()
    run.kill([run.workers()[0]])
    lost, _ = run.wait_until_it_goes_on(before)
    assert lost is not None and lost > CHECKPOINT_EVERY
    run.kill(run.tree())
