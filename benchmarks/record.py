"""The record of measurements: what one row says, and how new rows take the place of old ones."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import Field

from benchmarks.cases import Device, Dtype, num_cores
from benchmarks.peers import versions
from benchmarks.roofline import Peaks
from pipeline.core.config import Section, parse_section
from pipeline.core.files import read_json, write_json

RECORD = Path("benchmarks/results/meta_gradient.json")


class Machine(Section):
    """Where rows come from."""

    cpu: str
    cores: int
    gpu: str | None
    torch: str
    versions: dict[str, str]
    """Of the peers' libraries"""
    tf32: bool
    """Whether the card's convolutions in fp32 may round their inputs to TF32 (PyTorch's default)"""
    peaks: Peaks | None = None
    """None where they were not measured"""

    @property
    def name(self) -> str:
        """Short: the card, or the processor and its cores."""
        return self.gpu or f"{self.cpu}, {self.cores} cores"

    def product_flops_per_second(self, dtype: Dtype) -> float | None:
        """Of matrix products as this machine's convolutions take them, in TF32 where they may."""
        if self.peaks is None:
            return None
        if dtype == "fp32" and self.tf32:
            return self.peaks.tf32 or self.peaks.fp32
        peaks = {"fp32": self.peaks.fp32, "tf32": self.peaks.tf32, "bf16": self.peaks.bf16}
        return peaks.get(dtype)


class Row(Section):
    """One contestant in one case."""

    machine: str
    case: str
    engine: str
    chosen: str | None = None
    """The strategy that `auto` took"""
    peer: bool
    device: Device
    dtype: Dtype
    threads: int
    workers: int
    meta_batch: int
    tasks_per_second: float | None
    """Median over rounds; None where only memory was looked at"""
    minimum: float | None
    maximum: float | None
    rounds: int
    tasks_per_round: int
    peak_memory_bytes: int | None
    """Above what the process held before its first gradient; all workers together"""
    memory_extrapolated: bool = False
    """Not run, for want of memory: continued in a straight line from fewer inner steps"""
    gradient_error: float | None
    """|g - g64| / |g64|, against the eager loop in float64 on the same tasks"""

    data_wait_fraction: float | None = None
    """Of the time of a whole training run, what its steps waited for data"""

    @property
    def who(self) -> tuple[str, str, str, str, int, int]:
        """What a row is of."""
        return (self.machine, self.case, self.engine, self.dtype, self.threads, self.workers)

    @property
    def label(self) -> str:
        """The contestant, for people."""
        engine = f"{self.engine} ({self.chosen})" if self.chosen else self.engine
        if self.device == "cuda":
            return f"{engine} {self.dtype}"
        thread = "thread" if self.threads == 1 else "threads"
        many = f"{self.workers} × " if self.workers > 1 else ""
        return f"{engine} {self.dtype}, {many}{self.threads} {thread}"


class Roofline(Section):
    """The least time of the eager loop's kernels on a machine; see `roofline.py`.

    In bf16 it is a plain estimate: the same operations, every number of floating point at half the
    bytes, and the speed of bf16 products. Autocast leaves some kernels in fp32, so it needs more.
    """

    machine: str
    case: str
    bytes_per_task: int
    """In fp32"""
    least_seconds_per_task: dict[Literal["fp32", "bf16"], float]


class LeftOut(Section):
    """A contestant that did not run, and why."""

    machine: str
    case: str
    contestant: str
    reason: str


class Record(Section):
    """All measurements so far."""

    machines: dict[str, Machine] = Field(default_factory=dict)
    flops_per_task: dict[str, int] = Field(default_factory=dict)
    """Of the eager loop, by case: matrix products and convolutions, forward and backward"""
    rows: list[Row] = Field(default_factory=list)
    left_out: list[LeftOut] = Field(default_factory=list)
    rooflines: list[Roofline] = Field(default_factory=list)


_Measured = TypeVar("_Measured", Row, LeftOut, Roofline)


def this_machine(device: Device) -> Machine:
    """The facts that a row's numbers depend on; no names, no paths, no dates."""
    return Machine(
        cpu=cpu_model(),
        cores=num_cores(),
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        torch=torch.__version__,
        versions=versions(),
        tf32=device == "cuda" and torch.backends.cudnn.allow_tf32,
    )


def read_record(path: Path) -> Record:
    """A record from its file; an empty one where there is none.

    Raises:
        ConfigError: the file is no record.
    """
    if not path.exists():
        return Record()
    return parse_section(read_json(path), Record, where=str(path))


def write_record(path: Path, record: Record) -> None:
    """Write it whole, in a fixed order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.model_dump(mode="json"))


def merged(old: Record, new: Record) -> Record:
    """Both; of a machine's case that was measured again, only what is new."""
    again = {(x.machine, x.case) for x in [*new.rows, *new.left_out]}

    def kept(rows: Iterable[_Measured]) -> list[_Measured]:
        return [row for row in rows if (row.machine, row.case) not in again]

    return Record(
        machines={**old.machines, **new.machines},
        flops_per_task={**old.flops_per_task, **new.flops_per_task},
        rows=[*kept(old.rows), *new.rows],
        left_out=[*kept(old.left_out), *new.left_out],
        rooflines=[*kept(old.rooflines), *new.rooflines],
    )


def cpu_model() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
