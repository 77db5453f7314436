"""Did ours become slower? `python -m benchmarks.check` measures the small cases anew.

A speed says little on another day; its ratio to the eager loop of the same run does. The loop runs
with one thread here: what several threads do depends too much on what else the machine does. The
check fails when a ratio is more than 20 % below the recorded one, twice in a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import Case, Contestant, Device, cases_of, num_cores
from benchmarks.entrant import end_on_sigterm
from benchmarks.entries import entrants
from benchmarks.measure import Effort, measure
from benchmarks.record import RECORD, Record, Row, read_record, this_machine
from benchmarks.report import ratio
from pipeline.runtime.logs import run_main

SMALL = {1, 7}
TOLERANCE = 0.2


class Comparison(NamedTuple):
    """One contestant of ours, then and now."""

    case: str
    label: str
    recorded: float
    """Ratio to the eager loop"""
    now: float | None
    """None: it did not run"""

    @property
    def fell(self) -> bool:
        """By more than the tolerance."""
        return self.now is None or self.now < (1 - TOLERANCE) * self.recorded


def main() -> None:
    """Measure, print a table, and fail if a ratio fell."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.check")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
    options = parser.parse_args()
    end_on_sigterm()
    effort = Effort(rounds=options.rounds, seconds=options.seconds)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    recorded, about = recorded_rows(read_record(options.record), device)
    print(about)
    compared = [row for case in cases_of(SMALL) for row in check(case, recorded, device, effort)]
    if not compared:
        sys.exit(f"{options.record} has no rows of these cases: run `make bench` first.")
    for row in compared:
        now = "did not run" if row.now is None else f"{row.now:6.2f}x  {_change(row):+6.1%}"
        mark = "FELL" if row.fell else "ok"
        print(f"{mark:5} {row.case:20} {row.label:28} recorded {row.recorded:6.2f}x  now {now}")
    if any(row.fell for row in compared):
        sys.exit(f"a ratio to the eager loop is more than {TOLERANCE:.0%} below the recorded one")


def recorded_rows(record: Record, device: Device) -> tuple[list[Row], str]:
    """Rows of this machine, or else of one with the same kind of device; and which."""
    here = this_machine(device).name
    rows = [row for row in record.rows if row.device == device]
    names = dict.fromkeys(row.machine for row in rows)
    if here in names or not names:
        return [row for row in rows if row.machine == here], f"against the record of {here}"
    other = next(iter(names))
    about = f"against the record of another machine ({other}); this one is {here}"
    return [row for row in rows if row.machine == other], about


def check(case: Case, recorded: Sequence[Row], device: Device, effort: Effort) -> list[Comparison]:
    """Measure a case; once more if a ratio fell, of which the better one counts."""
    old = [row for row in recorded if row.case == case.name]
    chosen = small_field(case, device)
    if not old:
        return []
    first = compare(old, _fresh(case, chosen, device, effort), chosen)
    if not any(row.fell for row in first):
        return first
    second = compare(old, _fresh(case, chosen, device, effort), chosen)
    return [
        max(pair, key=lambda row: -1.0 if row.now is None else row.now)
        for pair in zip(first, second, strict=True)
    ]


def small_field(case: Case, device: Device) -> list[Contestant]:
    """The eager loop on one thread, and ours on all cores."""
    field = entrants(case, device, num_cores())
    ours = [one for one in field if not one.is_peer and one.engine != "auto"]
    most = max(one.workers for one in ours)
    loops = [one for one in field if one.engine in ("eager", "plain") and one.precision == "fp32"]
    eager = min(loops, key=lambda one: one.threads)
    return [eager, *(one for one in ours if one.workers == most)]


def compare(
    recorded: Sequence[Row], fresh: Sequence[Row], chosen: Sequence[Contestant]
) -> list[Comparison]:
    """Ratios to the eager loop, then and now, of every chosen contestant that is recorded."""
    (eager,) = (one for one in chosen if one.is_peer)
    old_eager, new_eager = _row_of(eager, recorded), _row_of(eager, fresh)
    found = []
    for contestant in chosen:
        old, new = _row_of(contestant, recorded), _row_of(contestant, fresh)
        before = ratio(old, old_eager)
        if old is None or before is None or contestant.is_peer:
            continue
        found.append(Comparison(old.case, old.label, before, ratio(new, new_eager)))
    return found


def _row_of(contestant: Contestant, rows: Sequence[Row]) -> Row | None:
    wanted = (contestant.engine, contestant.precision, contestant.threads, contestant.workers)
    return next((r for r in rows if (r.engine, r.dtype, r.threads, r.workers) == wanted), None)


def _fresh(
    case: Case, chosen: Sequence[Contestant], device: Device, effort: Effort
) -> Sequence[Row]:
    without_error = case.model_copy(update={"error_tasks": 0})
    return measure(without_error, chosen, effort, this_machine(device), Record()).rows


def _change(row: Comparison) -> float:
    assert row.now is not None
    return row.now / row.recorded - 1


if __name__ == "__main__":
    run_main(main)
