"""Tasks per second of ours and of others, side by side: `python -m benchmarks.contest`.

Every contestant is a process (or one for each worker) of this driver. All of a case are started
first; then each in turn is told to run one round while the others wait, round after round, so that
whatever else the machine does hits all alike. A round is as many tasks as take about `--seconds`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case, Device, cases_of, num_cores
from benchmarks.entrant import end_on_sigterm
from benchmarks.entries import entrants
from benchmarks.measure import Effort, measure
from benchmarks.peers import PEERS
from benchmarks.record import (
    RECORD,
    Machine,
    Record,
    Row,
    merged,
    read_record,
    this_machine,
    write_record,
)
from benchmarks.roofline import peaks_of
from pipeline.engine.meta_gradient import STRATEGIES
from pipeline.runtime.logs import run_main

DEFAULT_CASES = {"cpu": "1,2,3,5,6,7,8,9", "cuda": "1,2,3,4,5,6,7,9"}
"""Case 4 takes an hour on two cores; case 8 is about processes on cores."""
ENGINES = (*PEERS, *STRATEGIES, "auto", "meta_train")
QUICK = Effort(rounds=2, seconds=0.5)


def main() -> None:
    """Run the chosen cases and put their rows into the record."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.contest")
    parser.add_argument("--cases", help="numbers, such as 1,7")
    parser.add_argument("--rounds", type=int, default=Effort().rounds)
    parser.add_argument("--seconds", type=float, default=Effort().seconds, help="of a round")
    parser.add_argument("--quick", action="store_true", help="2 rounds of half a second: a trial")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--engines", help="only these, such as eager,split")
    parser.add_argument("--record", type=Path, default=RECORD, help="file that rows go into")
    options = parser.parse_args()
    device: Device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    numbers = {int(part) for part in (options.cases or DEFAULT_CASES[device]).split(",")}
    unknown = numbers - {case.number for case in CASES}
    if unknown:
        parser.error(f"no case {min(unknown)}; there are {sorted({c.number for c in CASES})}")
    effort = QUICK if options.quick else Effort(rounds=options.rounds, seconds=options.seconds)
    only = set(options.engines.split(",")) if options.engines else None
    if only and not only <= set(ENGINES):
        parser.error(f"no engine {min(only - set(ENGINES))}; there are {', '.join(ENGINES)}")
    if options.record == RECORD and (only or effort.rounds < Effort().rounds):
        parser.error(
            f"{RECORD} is for whole cases of {Effort().rounds} rounds or more: name another file "
            "for the rows of a trial, or of some contestants, with --record"
        )
    record = read_record(options.record)
    end_on_sigterm()
    machine = this_machine(device).model_copy(update={"peaks": peaks_of(device)})
    for case in cases_of(numbers):  # kept case by case: a run that is stopped is not lost
        found = contest([case], machine, device, effort, only=only, before=record)
        record = merged(record, found)
        write_record(options.record, record)


def contest(
    cases: Sequence[Case],
    machine: Machine,
    device: Device,
    effort: Effort,
    *,
    only: set[str] | None = None,
    before: Record | None = None,
    tell: Callable[[str], None] = print,
) -> Record:
    """Measure cases one after the other; contestants that cannot run are named, with the reason.

    Args:
        only: engines that take part; None: all.
        before: earlier rows, from which memory is extrapolated.
    """
    record = Record(machines={machine.name: machine})
    for case in cases:
        tell(f"\n{case.number}. {case.title} ({machine.name})")
        chosen = [c for c in entrants(case, device, num_cores()) if not only or c.engine in only]
        found = measure(case, chosen, effort, machine, before or record)
        for row in sorted(found.rows, key=lambda row: -(row.tasks_per_second or 0)):
            tell(_line(row))
        for missing in found.left_out:
            tell(f"   {missing.contestant}: left out: {missing.reason}")
        record = merged(record, found)
    return record


def _line(row: Row) -> str:
    parts = [f"   {row.label:32}"]
    if row.tasks_per_second is not None:
        spread = f"({row.minimum:.2f} to {row.maximum:.2f})"
        parts.append(f"{row.tasks_per_second:9.2f} tasks/s {spread:20}")
    if row.peak_memory_bytes is not None:
        about = "≈" if row.memory_extrapolated else " "
        parts.append(f"{about}{row.peak_memory_bytes / 2**20:8.0f} MiB")
    if row.gradient_error is not None:
        parts.append(f"error {row.gradient_error:.1e}")
    return " ".join(parts)


if __name__ == "__main__":
    run_main(main)
