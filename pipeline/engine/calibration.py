"""How fast each strategy is on this machine, on tasks like those of the run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.algorithms.base import Algorithm
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.meta_gradient import Engine, Strategy
from pipeline.engine.replay import Compute, computed_by
from pipeline.runtime.context import Context
from pipeline.runtime.logs import say

_ROUNDS, _ENOUGH_SECONDS = 3, 2.0
LONGEST_SECONDS = 60.0
"""No further strategy is tried after so long: the other workers wait in a collective meanwhile."""


class Work(NamedTuple):
    """What a choice is for."""

    algorithm: Algorithm
    model: Model
    params: Params
    tasks: Sequence[Task]
    """A group of the largest shape"""
    context: Context


class Calibration(NamedTuple):
    """What came of it."""

    tasks_per_second: dict[Strategy, float]
    """Of those that were tried and did not fail"""
    any_failed: bool


def calibrate(engines: dict[Strategy, Engine], work: Work) -> Calibration:
    """Each strategy: in turn, on a GPU one by one, for recordings keep their memory there."""
    if work.context.device.type != "cuda":
        return _in_turn(engines, work)
    rates: dict[Strategy, float] = {}
    any_failed = False
    for name, engine in engines.items():
        found = _in_turn({name: engine}, work)
        rates |= found.tasks_per_second
        any_failed |= found.any_failed
        torch.cuda.empty_cache()
    return Calibration(rates, any_failed)


def _in_turn(engines: dict[Strategy, Engine], work: Work) -> Calibration:
    """Tasks per second of each; one that fails is left out, and said.

    The first turn takes a task or two; by its time the others take as many of the group as a few
    seconds allow. Where that is too few to fill a chunk, batching looks slower than it is.
    """
    num_tasks = len(work.tasks)
    runs = {n: computed_by(e) for n, e in engines.items()}
    counts = {n: min(num_tasks, 2 if e.at_once else 1) for n, e in engines.items()}
    seconds: dict[Strategy, list[float]] = {}
    failed: set[Strategy] = set()
    begin = time.perf_counter()
    for turn in range(1 + _ROUNDS):
        for name in engines if turn == 0 else list(seconds):
            if turn == 0 and seconds and time.perf_counter() - begin > LONGEST_SECONDS:
                break
            if work.context.stopping():
                return Calibration({}, any_failed=True)
            try:
                once = _seconds(runs[name], engines[name], work, counts[name])
            except RuntimeError as error:
                say("engine", strategy=name, left_out=str(error).splitlines()[0])
                seconds.pop(name, None)
                failed.add(name)
                continue
            seconds.setdefault(name, []).append(once)
        if any(max(times) > _ENOUGH_SECONDS for times in seconds.values()):
            break  # slow enough to count its first turn
        if turn == 0:
            for name, (once,) in seconds.items():
                affordable = int(counts[name] * _ENOUGH_SECONDS / once)
                counts[name] = max(counts[name], min(num_tasks, affordable))
            seconds = {n: [] for n in seconds}
    rates = {n: counts[n] / statistics.median(times) for n, times in seconds.items() if times}
    return Calibration(rates, bool(failed))


def _seconds(compute: Compute, engine: Engine, work: Work, num_tasks: int) -> float:
    """Of one gradient; on a GPU of the second, for a shape's first call may record."""
    algorithm, model, params, tasks, context = work
    on_gpu = context.device.type == "cuda"
    seconds = 0.0
    for _ in range(2 if on_gpu else 1):
        start = time.perf_counter()
        compute(algorithm, model, params, tasks[:num_tasks], engine)
        if on_gpu:
            torch.cuda.synchronize(context.device)
        seconds = time.perf_counter() - start
    return seconds
