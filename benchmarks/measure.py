"""How one case is measured: reference, warm-up, interleaved rounds, memory, gradient error."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from pydantic import PositiveInt

from benchmarks.cases import CASES, Case, Contestant, num_cores
from benchmarks.entrant import Entrant, EntrantError
from benchmarks.peers import missing_library
from benchmarks.record import LeftOut, Machine, Record, Roofline, Row
from benchmarks.roofline import (
    FLOAT_BYTES,
    Operation,
    Operations,
    least_seconds,
    total_bytes,
    total_flops,
)
from pipeline.core.config import Section
from pipeline.core.types import Params

_MEMORY_SHARE = 0.8  # of what is free: above it, memory is extrapolated and not tried


class Effort(Section):
    """How long to measure."""

    rounds: PositiveInt = 5
    seconds: float = 1.5
    """Of one round"""


class _Left:
    """Collects those that did not run."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self.case, self.machine = case, machine
        self.rows: list[LeftOut] = []

    def add(self, contestant: Contestant, reason: str) -> None:
        self.rows.append(
            LeftOut(
                machine=self.machine.name,
                case=self.case.name,
                contestant=contestant.label,
                reason=reason,
            )
        )

    def survivors(
        self, entrants: Sequence[Entrant], action: Callable[[Entrant], None]
    ) -> list[Entrant]:
        """Those for which the action worked; the others are ended."""
        alive = []
        for entrant in entrants:
            try:
                action(entrant)
                alive.append(entrant)
            except EntrantError as error:
                self.add(entrant.contestant, str(error))
                entrant.kill()
        return alive


def measure(
    case: Case, contestants: Sequence[Contestant], effort: Effort, machine: Machine, before: Record
) -> Record:
    """One case: its rows, and those left out.

    Args:
        before: earlier rows, from which memory is extrapolated.
    """
    left = _Left(case, machine)
    rows, running = [], []
    with tempfile.TemporaryDirectory(prefix="metaloom-bench-") as name:
        scratch = Path(name)
        reference, operations = _reference(case, contestants, scratch, left)
        try:
            for contestant in contestants:
                if missing := missing_library(contestant.engine):
                    left.add(contestant, f"{missing} is not installed")
                elif (too_much := _beyond_memory(case, contestant, before)) is not None:
                    rows.append(_extrapolated(case, contestant, machine.name, too_much))
                else:
                    folder = scratch / str(len(running))
                    running.append(Entrant(case, contestant, folder))
            running = _run(case, running, effort, reference, left)
        finally:
            for entrant in running:
                entrant.kill()
    running.sort(key=lambda entrant: contestants.index(entrant.contestant))
    rows += [_row(case, entrant, machine.name) for entrant in running]
    record = Record(rows=rows, left_out=left.rows)
    return record if operations is None else _with_roofline(record, case, machine, operations)


def _run(
    case: Case, running: list[Entrant], effort: Effort, reference: Params | None, left: _Left
) -> list[Entrant]:
    """All rounds of all; returns those that came through."""

    def ready(entrant: Entrant) -> None:
        entrant.ask("ready")

    def warm(entrant: Entrant) -> None:
        # On a card the first loads libraries and records, and `auto` calibrates in it.
        sets_up = entrant.contestant.device == "cuda" or entrant.contestant.engine == "auto"
        quickest = math.inf
        for turn in range(1 if case.kind == "memory" else 3 + sets_up):
            answers = entrant.ask("round", quanta=1)
            if turn == 0 and sets_up and case.kind != "memory":
                continue
            quickest = min(quickest, max(answer["seconds"] for answer in answers))
            if quickest > effort.seconds:
                break
        entrant.quanta = max(1, math.ceil(effort.seconds / quickest))

    def one_round(entrant: Entrant) -> None:
        answers = entrant.ask("round", quanta=entrant.quanta)
        # Ours share a meta-batch, of which each tells the size; a peer's processes know nothing of
        # each other.
        own = [a["tasks"] for a in answers]
        entrant.tasks_per_round = sum(own) if entrant.contestant.is_peer else own[0]
        entrant.rates.append(entrant.tasks_per_round / max(a["seconds"] for a in answers))

    def inspect(entrant: Entrant) -> None:
        answers = entrant.ask("memory")
        entrant.data_wait_fraction = answers[0]["data_wait_fraction"]
        if entrant.contestant.engine == "auto":  # its peak may be that of what it tried
            entrant.strategy = answers[0]["strategy"]
        else:
            entrant.peak_memory_bytes = sum(answer["bytes"] for answer in answers)
        if reference is not None:  # there is none where it was not asked for, or did not fit
            gradient = _gradient(entrant, case.error_tasks)[0]
            entrant.gradient_error = relative_error(gradient, reference)

    running = left.survivors(left.survivors(running, ready), warm)
    for i in range(effort.rounds if case.kind != "memory" else 0):
        turn = i % max(1, len(running))  # nobody always follows the same neighbour
        running = left.survivors(running[turn:] + running[:turn], one_round)
    return left.survivors(running, inspect)


def _reference(
    case: Case, contestants: Sequence[Contestant], scratch: Path, left: _Left
) -> tuple[Params | None, Operations | None]:
    """The eager loop's gradient in float64, and the operations that it takes for these tasks."""
    if not case.error_tasks or not contestants:
        return None, None
    engine = "plain" if case.algorithm == "protonet" else "eager"
    device = contestants[0].device
    judge = Contestant(engine=engine, precision="fp64", threads=num_cores(), device=device)
    entrant = Entrant(case, judge, scratch / "reference")
    try:
        return _gradient(entrant, case.error_tasks, count=True)
    except EntrantError as error:
        left.add(judge, f"{error}; so no gradient errors")
        return None, None
    finally:
        entrant.kill()


def _gradient(
    entrant: Entrant, num_tasks: int, *, count: bool = False
) -> tuple[Params, Operations]:
    # Every worker computes the same sum over the same first tasks.
    file = entrant.scratch / "gradient.safetensors"
    answers = entrant.ask("gradient", tasks=num_tasks, count=count, file=str(file))
    operations = {Operation(*one): times for one, times in answers[0]["operations"]}
    return safetensors.torch.load_file(file), operations


def relative_error(gradient: Params, reference: Params) -> float:
    """|g - g64| / |g64| over all parameters together."""
    assert gradient.keys() == reference.keys()
    names = sorted(reference)
    exact = torch.cat([reference[n].double().flatten() for n in names])
    found = torch.cat([gradient[n].double().flatten() for n in names])
    return float((found - exact).norm() / exact.norm())


def _beyond_memory(case: Case, contestant: Contestant, before: Record) -> int | None:
    """Memory in a straight line through two shorter inner loops, where it is too much to try."""
    if case.kind != "memory":
        return None
    steps = {c.name: c.inner_steps for c in CASES if c.kind == "memory"}
    points = sorted(
        (steps[row.case], row.peak_memory_bytes)
        for row in before.rows
        if row.case in steps
        and row.engine == contestant.engine
        and row.peak_memory_bytes is not None
        and not row.memory_extrapolated
    )
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points[-2:]
    expected = y1 + (y1 - y0) * (case.inner_steps - x1) // (x1 - x0)
    return expected if expected > _MEMORY_SHARE * _free_bytes(contestant) else None


def _free_bytes(contestant: Contestant) -> int:
    if contestant.device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def _with_roofline(record: Record, case: Case, machine: Machine, operations: Operations) -> Record:
    """What the eager loop computes in one task and, where speeds are known, how fast it can."""
    flops = {case.name: total_flops(operations) // case.error_tasks}
    if machine.peaks is None:
        return record.model_copy(update={"flops_per_task": flops})
    seconds = {}
    for dtype, float_bytes in FLOAT_BYTES.items():
        peak = machine.product_flops_per_second(dtype)
        assert peak is not None
        least = least_seconds(operations, peak, machine.peaks.bytes_per_second, float_bytes)
        seconds[dtype] = least / case.error_tasks
    roofline = Roofline(
        machine=machine.name,
        case=case.name,
        bytes_per_task=total_bytes(operations, FLOAT_BYTES["fp32"]) // case.error_tasks,
        least_seconds_per_task=seconds,
    )
    return record.model_copy(update={"flops_per_task": flops, "rooflines": [roofline]})


def _row(case: Case, entrant: Entrant, machine: str) -> Row:
    rates = entrant.rates
    return _basis(case, entrant.contestant, machine).model_copy(
        update={
            "tasks_per_second": statistics.median(rates) if rates else None,
            "minimum": min(rates, default=None),
            "maximum": max(rates, default=None),
            "rounds": len(rates),
            "tasks_per_round": entrant.tasks_per_round,
            "chosen": entrant.strategy,
            "data_wait_fraction": entrant.data_wait_fraction,
            "peak_memory_bytes": entrant.peak_memory_bytes,
            "gradient_error": entrant.gradient_error,
        }
    )


def _extrapolated(case: Case, contestant: Contestant, machine: str, peak: int) -> Row:
    return _basis(case, contestant, machine).model_copy(
        update={"peak_memory_bytes": peak, "memory_extrapolated": True}
    )


def _basis(case: Case, contestant: Contestant, machine: str) -> Row:
    """A row with nothing measured yet."""
    return Row(
        machine=machine,
        case=case.name,
        engine=contestant.engine,
        peer=contestant.is_peer,
        device=contestant.device,
        dtype=contestant.precision,
        threads=contestant.threads,
        workers=contestant.workers,
        meta_batch=case.meta_batch,
        tasks_per_second=None,
        minimum=None,
        maximum=None,
        rounds=0,
        tasks_per_round=0,
        peak_memory_bytes=None,
        gradient_error=None,
    )
