"""Entries of workers on machines that err: whole runs with one thing wrong in one of them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.core.config import Section
from pipeline.engine import runner
from pipeline.evaluation import scoring
from pipeline.runtime import resume
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context
from pipeline.runtime.journal import Point
from pipeline.runtime.metric_log import MetricLog
from pipeline.runtime.storage import Storage
from pipeline.store.reader import Store
from pipeline.training import loop, meta_train
from pipeline.training.incidents import Incidents
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainJob, run
from pipeline.training.programs import MetaTraining
from pipeline.training.state import TrainState
from pipeline.training.steps import Step
from tests.conftest import write_blob_store


class Flip(Section):
    """One bit of one worker's parameters flips, once."""

    job: MetaTrainJob
    rank: int
    step: int
    """Behind this one's update"""
    place: float
    """Which parameter, in [0, 1)"""
    bit: int
    done: Path
    """Made when it has happened"""
    guarded: bool = True


def flipped(plan: Flip, context: Context) -> dict[str, Any]:
    """Train on memory that errs once."""
    update = loop._update

    def err(state: TrainState, step: Step, config: OuterConfig) -> TrainState:
        new = update(state, step, config)
        if context.rank == plan.rank and new.progress.step == plan.step and not plan.done.exists():
            plan.done.touch()
            words = new.vector.view(torch.int32)
            words[int(plan.place * len(words))] ^= -(2**31) if plan.bit == 31 else 1 << plan.bit
        return new

    loop._update = err
    if not plan.guarded:
        loop.check_agreement = lambda tensors, step, context: None
    return run(plan.job, context)


class Bug(Section):
    """A mistake that ends the process at some steps."""

    job: MetaTrainJob
    starts: Path
    """A line for every start that met a step of the mistake: which"""
    times: dict[int, int | None]
    """At which step how often; None: always"""


def buggy(plan: Bug, context: Context) -> dict[str, Any]:
    """Train with a mistake of ours on the last worker."""
    update = loop._update

    def err(state: TrainState, step: Step, config: OuterConfig) -> TrainState:
        at = state.progress.step
        if context.rank == context.world_size - 1 and at in plan.times:
            met = plan.starts.read_text().split() if plan.starts.exists() else []
            most = plan.times[at]
            if most is None or met.count(str(at)) < most:
                plan.starts.write_text("\n".join([*met, str(at)]))
                raise ZeroDivisionError(f"a mistake at step {at}")
        return update(state, step, config)

    loop._update = err
    return run(plan.job, context)


class Slow(Section):
    """One worker takes longer."""

    job: MetaTrainJob
    rank: int
    seconds: float
    what: str
    """`compute`, `data`, `checkpoints`, `validation`, `incident` or `uploads`"""
    waits: bool = True
    """False: the others go on into the next exchange"""
    begun: Path | None = None
    """Made when it is slow for the first time"""


_PLACES: dict[str, tuple[Any, str]] = {
    "compute": (MetaTraining, "gradient"),
    "data": (Store, "gather"),
    "checkpoints": (resume, "save_checkpoint"),
    "validation": (scoring, "_best"),
    "incident": (Incidents, "_record"),
    "uploads": (Storage, "put"),
}


def slowed(plan: Slow, context: Context) -> dict[str, Any]:
    """Train beside a worker whose processor, or whose disk, is slow."""
    if not plan.waits:
        Context.wait_for_all = lambda self, what: None
    if context.rank == plan.rank:
        owner, name = _PLACES[plan.what]
        quick = getattr(owner, name)

        def slow(*arguments: Any) -> Any:
            if plan.begun is not None:
                plan.begun.touch()
            time.sleep(plan.seconds)
            return quick(*arguments)

        setattr(owner, name, slow)
    return run(plan.job, context)


class Counted(Section):
    """A run whose steps can be counted while it goes on, whatever its launcher's journal does."""

    job: MetaTrainJob
    steps: Path


class _Counting:
    """A log of metrics that also appends each step, and when it was done, to a file.

    Steps that were done before a start are told again by it, with the time of then.
    """

    def __init__(self, log: MetricLog, steps: Path) -> None:
        self.flush, self.close = log.flush, log.close
        self._log, self._steps = log, steps

    def write(self, point: Point) -> None:
        self._log.write(point)
        with self._steps.open("a") as file:
            file.write(f"{point.step} {point.time}\n")


def counted(plan: Counted, context: Context) -> dict[str, Any]:
    """Train."""
    open_log = context.open_log
    context = replace(context, open_log=lambda path: _Counting(open_log(path), plan.steps))
    return run(plan.job, context)


class Hang(Section):
    """One worker stops, as by SIGSTOP, while the others wait for it outside any collective."""

    rank: int
    how: str
    """`main`: they wait for the main worker alone; `all`: for each other"""
    done: Path
    """Made when it has happened"""


def hung(plan: Hang, context: Context) -> list[int]:
    """Wait for each other; in the first start one never comes."""
    if context.rank == plan.rank and not plan.done.exists():
        plan.done.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    wait = context.wait_for_main if plan.how == "main" else context.wait_for_all
    for _ in range(2):
        wait("a test")
    own = torch.tensor([context.rank])
    came: list[int] = gather_shares(own, context.world_size, context).tolist()
    return came


class Deaf(Section):
    """Whether a worker that is asked to stop tells the others."""

    job: MetaTrainJob
    guarded: bool


def deaf(plan: Deaf, context: Context) -> dict[str, Any]:
    """Train; without the guard each worker stops when it is asked to itself."""
    take_step = loop.take_step

    def alone(*arguments: Any) -> Step:
        return replace(take_step(*arguments), stop=context.stopping())

    if not plan.guarded:
        loop.take_step = alone
    return run(plan.job, context)


class Hungry(Section):
    """A worker whose allocator refuses everything."""

    job: MetaTrainJob
    rank: int


def hungry(plan: Hungry, context: Context) -> dict[str, Any]:
    """Train; one worker has no memory for a single task."""

    def refuse(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 64 GiB")

    if context.rank == plan.rank:
        runner.computed_by = lambda engine: refuse
    return run(plan.job, context)


class Strange(Section):
    """A worker whose disk holds another store."""

    job: MetaTrainJob
    store: Path
    guarded: bool


def strange(plan: Strange, context: Context) -> dict[str, Any]:
    """Train; the second worker reads a store of the same shape with other pictures."""
    if not plan.guarded:
        meta_train.check_same_inputs = lambda facts, context: None
    if context.rank == 0:
        return run(plan.job, context)
    write_blob_store(plan.store, seed=1)
    return run(plan.job.model_copy(update={"store": plan.store}), context)
