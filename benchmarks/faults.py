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
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.record import cpu_model
from benchmarks.timed_run import Timed
from benchmarks.whole_loop import job_of, prepare
from pipeline.core.files import write_json
from pipeline.launch.base import Job
from pipeline.launch.table import LAUNCHERS
from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.runtime.lineage import git_state

RECORD = Path("benchmarks/results/faults.json")
_CASE, _WARM_STEPS = 9, 2


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
                    "benchmarks.timed_run:timed",
                    Timed(job=job.model_copy(update={"config": config})),
                    workers,
                )
                begin = time.time()
                spent = LAUNCHERS[name](run, folder / f"launch-{name}-{number}")
                times = [point.time for point, _ in read_points(job.journal)][_WARM_STEPS:]
                tasks = (len(times) - 1) * case.meta_batch
                found[name].append(
                    {
                        "tasks_per_second": tasks / (times[-1] - times[0]),
                        "seconds_to_the_third_step": times[0] - begin,
                        "spent": spent,
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
    parser.add_argument("--launchers", default="local,torchrun,ray_train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="with a checkpoint every 20")
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
    state = git_state(Path.cwd())
    about = {"commit": state.commit[:7] + "+" * state.dirty, "processor": cpu_model()}
    about |= {"workers": options.workers, "steps": options.steps}
    write_json(RECORD, {**about, "launchers": found})


if __name__ == "__main__":
    main()
