"""What fault tolerance costs while nothing breaks, and what a launcher costs.

    python -m benchmarks.faults [--launchers local,torchrun,ray_train] [--rounds 3]

Runs the same meta-training under each launcher in turn, with clocks around everything that a run
does for the sake of faults, on its main worker: writing checkpoints; comparing the workers'
numbers; looking at every group's norm for incidents and at every worker's time for stragglers. Ray
runs on the cluster of RAY_ADDRESS, or on one that is started for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.whole_loop import job_of, prepare
from pipeline.core.config import Section
from pipeline.core.files import write_json
from pipeline.launch.base import Job
from pipeline.launch.table import LAUNCHERS
from pipeline.runtime.context import SINGLE, Context
from pipeline.runtime.journal import read_points
from pipeline.training import loop, meta_train, steps
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.stragglers import Stragglers

RECORD = Path("benchmarks/results/faults.json")
_CASE = 9
_WARM_STEPS = 2


class Timed(Section):
    """A run whose clocks are read."""

    job: MetaTrainJob


def timed(config: Timed, context: Context) -> dict[str, Any]:
    """The entry of every worker: seconds by what they were spent on, of the main one."""
    spent: dict[str, float] = defaultdict(float)
    targets = [
        (loop.Keeper, "save", "checkpoints"),
        (loop, "check_agreement", "comparing the workers"),
        (loop, "_incident", "incidents and stragglers"),
        (Stragglers, "look", "incidents and stragglers"),
        (steps, "mean_norm", "incidents and stragglers"),
    ]
    with _clocks(targets, spent):
        begin = time.perf_counter()
        meta_train.run(config.job, context)
        spent["everything"] = time.perf_counter() - begin
    points = [point for point, _ in read_points(config.job.journal)]
    return {"spent": dict(spent), "first": points[_WARM_STEPS].time, "last": points[-1].time}


@contextmanager
def _clocks(targets: list[tuple[Any, str, str]], spent: dict[str, float]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    for owner, name, what in targets:
        setattr(owner, name, _clocked(getattr(owner, name), what, spent))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _clocked(
    function: Callable[..., Any], what: str, spent: dict[str, float]
) -> Callable[..., Any]:
    def clocked(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[what] += time.perf_counter() - begin

    return clocked


def measure(launchers: list[str], rounds: int, workers: int, num_steps: int) -> dict[str, Any]:
    """Rows by launcher, the launchers in turn in each round."""
    case = next(case for case in CASES if case.number == _CASE)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in launchers}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(case, folder, SINGLE)
        for number in range(rounds):
            for name in launchers:
                job = job_of(case, folder, f"{name}-{number}", SINGLE)
                outer = {"num_steps": num_steps, "validate_every": num_steps}
                config = job.config.model_copy(
                    update={"outer": job.config.outer.model_copy(update=outer)}
                )
                run = Job(
                    "benchmarks.faults:timed",
                    Timed(job=job.model_copy(update={"config": config})),
                    workers,
                )
                begin = time.time()
                told = LAUNCHERS[name](run, folder / f"launch-{name}-{number}")
                tasks = (num_steps - 1 - _WARM_STEPS) * case.meta_batch
                found[name].append(
                    {
                        "tasks_per_second": tasks / (told["last"] - told["first"]),
                        "seconds_to_the_third_step": told["first"] - begin,
                        "spent": told["spent"],
                    }
                )
                print(
                    f"{name:10} round {number}: {found[name][-1]['tasks_per_second']:.2f} tasks/s"
                )
    return {name: _summary(rows) for name, rows in found.items()}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for row in rows for name in row["spent"]} - {"everything"})
    return {
        "tasks_per_second": statistics.median(row["tasks_per_second"] for row in rows),
        "seconds_to_the_third_step": statistics.median(
            row["seconds_to_the_third_step"] for row in rows
        ),
        "share_of_the_run": {
            name: statistics.median(
                row["spent"].get(name, 0.0) / row["spent"]["everything"] for row in rows
            )
            for name in names
        },
        "rounds": len(rows),
    }


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launchers", default=",".join(LAUNCHERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    names = options.launchers.split(",")
    found = measure(names, options.rounds, options.workers, options.steps)
    base = found[names[0]]["tasks_per_second"]
    for name, row in found.items():
        shares = ", ".join(f"{what} {part:.2%}" for what, part in row["share_of_the_run"].items())
        rate = row["tasks_per_second"]
        print(
            f"{name:10} {rate:7.2f} tasks/s ({rate / base:.2f} of {names[0]}), third step after "
            f"{row['seconds_to_the_third_step']:.1f} s; {shares}"
        )
    write_json(RECORD, {"workers": options.workers, "steps": options.steps, "launchers": found})


if __name__ == "__main__":
    main()
