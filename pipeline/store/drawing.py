"""Drawing a plan: on all cores, in processes that a bad picture may kill without further harm."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.domains.base import Domain, Drawn, Job

WORKER_MEMORY_BYTES = 512 << 20
"""Address space that a worker may take beyond what its imports need."""
DIED = "its decoder died or took too much memory"


class Bar(Protocol):
    """Shows how far the work has come."""

    def advance(self, count: int = 1) -> None:
        """Count finished pictures."""


class Progress(Protocol):
    """Makes a bar for the length of a piece of work."""

    def __call__(self, label: str, *, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Show a bar of `total` units."""


class Drawing(Protocol):
    """SEAM: who draws a plan's jobs. The order in which they come back tells nothing."""

    def __call__(
        self, domain: Domain, jobs: Sequence[Job], *, num_workers: int | None = None
    ) -> Iterator[tuple[Job, Drawn]]:
        """Draw every job; a part of one may come back as a job of its own."""


def drawing_from_environment() -> Drawing:
    """On a Ray cluster if METALOOM_LAUNCHER is ray_train, else here: the same pictures."""
    if os.environ.get("METALOOM_LAUNCHER") == "ray_train":
        from pipeline.store.ray_drawing import draw_on_ray

        return draw_on_ray
    return draw_jobs


@dataclass
class _Pool:
    """Worker processes, started anew after one of them died."""

    num_workers: int
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def submit(self, domain: Domain, job: Job) -> Future[Drawn]:
        if self._pool is None:
            # Not fork: the progress bar and the tracker run threads in this process.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, initializer=_limit_memory)
        return self._pool.submit(domain.draw, job)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draw_jobs(
    domain: Domain, jobs: Sequence[Job], *, num_workers: int | None = None
) -> Iterator[tuple[Job, Drawn]]:
    """Draw every job on this machine, in whatever order they finish.

    A job whose worker died (killed for its memory, or a fault in a decoder's C code) is halved
    until the one bad picture is found; that one is refused, and the others are drawn.
    """
    num_workers = num_workers or num_cores()
    with _pool(num_workers) as pool:
        broken = yield from _draw_together(pool, domain, jobs, window=4 * num_workers)
    with _pool(1) as pool:
        while broken:
            job = broken.pop()
            try:
                yield job, pool.submit(domain, job).result()
            except BrokenProcessPool:
                pool.close()
                if len(job.items) == 1:
                    yield job, _died(job)
                else:
                    broken.extend(_halves(job))


def _draw_together(
    pool: _Pool, domain: Domain, jobs: Sequence[Job], *, window: int
) -> Generator[tuple[Job, Drawn], None, list[Job]]:
    """Draw with a bounded number of jobs in flight; return the jobs that a death left undone."""
    waiting = list(reversed(jobs))
    running: dict[Future[Drawn], Job] = {}
    while waiting or running:
        try:
            while waiting and len(running) < window:
                running[pool.submit(domain, waiting[-1])] = waiting[-1]
                waiting.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running[future], future.result()
                del running[future]
        except BrokenProcessPool:
            return [*waiting, *running.values()]
    return []


def _halves(job: Job) -> list[Job]:
    middle = len(job.items) // 2
    return [
        replace(job, first=job.first + middle, items=job.items[middle:]),
        replace(job, items=job.items[:middle]),
    ]


def _died(job: Job) -> Drawn:
    return Drawn(np.empty((0, 0, 0, 0), dtype=np.uint8), (), {0: DIED})


@contextmanager
def _pool(num_workers: int) -> Iterator[_Pool]:
    pool = _Pool(num_workers)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def limited_memory() -> Iterator[None]:
    """`_limit_memory` for a while, in a process that is not ours alone."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    _limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory() -> None:
    """Let an allocation fail in the worker, rather than the machine run out of memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = in_use + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
