"""How much memory a gradient will take, known before it is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.functional import Model
from pipeline.core.types import Params, Statistics, Task
from pipeline.runtime.context import Context, default_num_workers

_NO_MEMORY = ("can't allocate memory", "could not create a primitive")
"""What PyTorch's allocator for CPUs says, and oneDNN, which gives no other reason."""


class _Ledger:
    """Storages that graphs hold on to, each counted once, now and at most."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.most = self.largest = 0

    def take(self, tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.holders:
            self.now += size
            self.most = max(self.most, self.now)
            self.largest = max(self.largest, size)
        self.holders[key] = self.holders.get(key, 0) + 1
        return key, size

    def drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size


class _Held:
    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor, self._ledger = tensor, ledger
        self._entry = ledger.take(tensor)

    def __del__(self) -> None:
        self._ledger.drop(*self._entry)


@contextmanager
def _watched() -> Iterator[_Ledger]:
    ledger = _Ledger()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, ledger), lambda held: held.tensor
    ):
        yield ledger


_TEMPORARIES = 4
"""Tensors of the largest size that an operation holds beside the graph."""


def planned_bytes(
    gradient: Callable[[Model, Params, Task], object], model: Model, params: Params, task: Task
) -> int:
    """Most bytes that a gradient of one task takes above its inputs.

    The gradient runs on tensors without data (PyTorch's `meta` device), so that nothing is computed
    and nothing allocated; what its graphs hold at any moment is counted, each storage once.

    Raises:
        RuntimeError: it looks at a number, or uses an operation that knows no such tensors.
    """
    shapes = {n: torch.empty_like(p, device="meta") for n, p in params.items()}
    empty = Task(
        support_x=task.support_x.to("meta"),
        support_y=task.support_y.to("meta"),
        query_x=task.query_x.to("meta"),
        query_y=task.query_y.to("meta"),
        num_ways=task.num_ways,
    )
    statistics = model.statistics
    if statistics is not None:
        statistics = {n: s.to("meta") for n, s in statistics.items()}
    with _watched() as ledger:
        gradient(model.with_statistics(statistics), shapes, empty)
    return ledger.most + _TEMPORARIES * ledger.largest + 2 * bytes_of(params)


def bytes_of(params: Params | Statistics) -> int:
    """Bytes of all tensors."""
    return sum(p.nbytes for p in params.values())


def bytes_for_a_worker(context: Context) -> int:
    """Memory that a worker may count on: its share of its GPU's, or of what the machine has.

    All of it and not what is free at the moment, and the share that it has when as many workers run
    as this machine starts by default: a plan, and with it a run's bits, must not depend on the hour
    or on the number of workers. (On a GPU it does where there are more workers than GPUs.)
    """
    if context.device.type == "cuda":
        total = int(torch.cuda.get_device_properties(context.device).total_memory)
        return total // context.workers_per_device
    return _bytes_of_machine() // default_num_workers()


def _bytes_of_machine() -> int:
    """What there is, or less where a control group sets a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator refused: a GPU's by its own class, the CPU's by its text alone."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(sign in told for sign in _NO_MEMORY)
