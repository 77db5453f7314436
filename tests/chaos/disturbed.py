"""A training run in processes of its own, to be disturbed while it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.config import Section
from pipeline.launch.base import Job
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.meta_train import run as run_meta_training
from tests.chaos.campaign import Campaign, Try
from tests.contract.drive import REPOSITORY, outcome, start
from tests.distributed.broken import Counted
from tests.distributed.small_run import digest, make_job

NUM_STEPS, CHECKPOINT_EVERY, VALIDATE_EVERY = 240, 12, 120
ENTRY = "pipeline.training.meta_train:run"
COUNTED = "tests.distributed.broken:counted"
_PATIENCE_SECONDS = 150.0
_WORKER = "pipeline.launch.worker"


def long_job(folder: Path, store: Store, tasks: Path, **changes: Any) -> MetaTrainJob:
    """A run of some seconds, so that there is time to disturb it."""
    settings = {"num_steps": NUM_STEPS, "checkpoint_every": CHECKPOINT_EVERY}
    settings["validate_every"] = VALIDATE_EVERY
    return make_job(folder, store, tasks, **{**settings, **changes})


class Disturbed:
    """One run, from its first start to its end, over all the times that it is started."""

    def __init__(
        self,
        job: MetaTrainJob,
        launcher: str,
        *,
        environment: Mapping[str, str] | None = None,
        min_workers: int | None = None,
        max_restarts: int = 50,
        entry: str = ENTRY,
        plan: Section | None = None,
    ) -> None:
        """`plan`: what `entry` is given instead of the job, of which it makes a run."""
        self.job = job
        self._counted: Path | None = None
        if launcher == "ray_train" and plan is None:  # its journal is filled at checkpoints alone
            self._counted = job.target.parent / "steps-done"
            entry, plan = COUNTED, Counted(job=job, steps=self._counted)
        self._entry, self._plan = entry, plan or job
        self._launcher, self._environment = launcher, dict(environment or {})
        self._min_workers, self._max_restarts = min_workers, max_restarts
        self._starts = 0
        self._offset, self._since = 0, 0.0
        self.driver: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    def start(self, num_workers: int) -> None:
        """Run the same command (again)."""
        self._starts += 1
        self._mark()
        self.folder = self.job.target.parent / f"start-{self._starts}"
        job = Job(self._entry, self._plan, num_workers, self._min_workers, self._max_restarts)
        self.driver = start(self._launcher, job, self.folder, self._environment)

    def steps(self) -> list[int]:
        """The steps that were done and logged since the last start or disturbance.

        Not those that were done before it and are told again.
        """
        if self._counted is not None:
            text = self._counted.read_text() if self._counted.exists() else ""
            done = [line.split() for line in text.splitlines(keepends=True) if line[-1] == "\n"]
            return [int(step) for step, when in done if float(when) > self._since]
        points = read_points(self.job.journal, self._offset)
        return [point.step for point, _ in points if point.time > self._since]

    def wait_for_steps(self, count: int) -> bool:
        """Until so many new steps are logged; False if the run ended before."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while len(self.steps()) < count:
            assert self.driver is not None
            if self.driver.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.003)
        return True

    def workers(self) -> dict[int, int]:
        """Process ids of the living workers, by rank."""
        assert self.driver is not None
        if self._launcher == "ray_train":
            told = re.findall(r'"rank": (\d+), "process": (\d+)', self.log())
            return {int(r): int(pid) for r, pid in told if psutil.pid_exists(int(pid))}
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                command = process.cmdline()
                ours = _WORKER in command and str(self.folder / "launch") in command
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(process.environ()["RANK"])] = process.pid
        return found

    def tree(self) -> list[int]:
        """The driver and everything that it has started: what dies with a machine."""
        assert self.driver is not None
        root = psutil.Process(self.driver.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]

    def kill(self, pids: list[int]) -> None:
        """kill -9."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_until_it_goes_on(self, before: list[int]) -> tuple[int | None, float]:
        """After a disturbance: (steps lost, seconds until the next step was logged).

        No number of lost steps where there was none left to be done.

        Args:
            before: the steps that had been logged since the last start, and maybe some more since.
        """
        begin = time.monotonic()
        reached = max([*before, *self.steps(), self.kept()])
        self._mark()
        if not self.wait_for_steps(1):
            return None, time.monotonic() - begin
        return reached - (self.steps()[0] - 1), time.monotonic() - begin

    def _mark(self) -> None:
        self._offset, self._since = self._end_of_journal(), time.time()

    def end(self) -> Any:
        """Wait for the end; returns the metrics, or raises what the run raised."""
        assert self.driver is not None
        return outcome(self.driver, self.folder)

    def child_environment(self) -> dict[str, str]:
        """For another process beside the driver."""
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, **self._environment, "PYTHONPATH": path}

    def log(self) -> str:
        """What the driver and its main worker have printed in this start."""
        return (self.folder / "drive.log").read_text(errors="replace")

    def restarts_told(self) -> list[str]:
        """Why the launcher has started the workers again, each time."""
        return [str(line["why"]) for line in told_of("restart", self.log())]

    def faults_told(self) -> list[str]:
        """Each time that the launcher has said something of a fault, or of another start."""
        faults = [str(line["why"]) for line in told_of("fault", self.log())]
        return faults + self.restarts_told()

    def is_running(self) -> bool:
        """Whether the driver lives."""
        return self.driver is not None and self.driver.poll() is None

    def kept(self) -> int:
        """Step of the newest checkpoint."""
        return newest_step(self.job.checkpoints)

    def _end_of_journal(self) -> int:
        return max((behind for _, behind in read_points(self.job.journal)), default=0)


def told_of(event: str, log: str) -> list[dict[str, Any]]:
    """The lines of one kind of event; Ray writes before each whose it is."""
    lines = [line for line in log.splitlines() if f'"event": "{event}"' in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


def undisturbed(
    folder: Path, store: Store, tasks: Path, *, num_steps: int = NUM_STEPS, **changes: Any
) -> tuple[Any, Any]:
    """Metrics and bits of the run that nothing disturbs, in this process; made once."""
    key = (store.folder, tasks, num_steps, *sorted(changes.items()))
    if key not in _UNDISTURBED:
        job = long_job(folder, store, tasks, num_steps=num_steps, **changes)
        _UNDISTURBED[key] = run_meta_training(job, SINGLE), digest(job)
    return _UNDISTURBED[key]


_UNDISTURBED: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def disturb(
    found: Campaign,
    wanted: int,
    begin: Callable[[str], Disturbed],
    once: Callable[[Disturbed], Try | None],
    expected: tuple[Any, Any],
) -> None:
    """Disturb one run after the other, each as often as it lasts, until there are enough tries.

    Args:
        begin: starts a run, by its name.
        once: disturbs it; None if it ended before.
        expected: metrics and bits of the run that nothing disturbs.
    """
    while len(found.tries) < wanted:
        run = begin(f"run-{len(found.tries)}")
        outcomes: list[Try] = []
        while len(found.tries) + len(outcomes) < wanted:
            outcome = once(run)
            if outcome is None:
                break
            outcomes.append(outcome)
        equal = (run.end(), digest(run.job)) == expected
        assert equal or outcomes, "a run that nothing disturbed ended with other bits"
        for outcome in outcomes:
            found.add(dataclasses.replace(outcome, bits_equal=equal))


def kill_worker(run: Disturbed, rng: random.Random, rank: int | None) -> Try | None:
    """Kill one worker after some steps; None if the run ended before."""
    if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
        return None
    time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, or in the writing of a checkpoint
    while not (pids := run.workers()) or (rank is not None and rank not in pids):
        if not run.is_running():
            return None
        time.sleep(0.05)  # Ray brings what its workers print after a while
    before, told = run.steps(), len(run.faults_told())
    begin = time.monotonic()
    run.kill([pids[rng.choice(sorted(pids)) if rank is None else rank]])
    while len(run.faults_told()) == told and run.is_running():
        time.sleep(0.01)
    noticed = time.monotonic() - begin
    lost, _ = run.wait_until_it_goes_on(before)
    if lost is None:
        return None
    seconds = time.monotonic() - begin
    return Try(len(before), survived=True, steps_lost=lost, seconds=seconds, noticed=noticed)
