"""The threads that run the network: whatever waits while they are busy is embedded together."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.deploy.serve.model import Pictures, Version
from pipeline.deploy.serve.problems import Problem

_PASSES_TOGETHER = 4
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """Pictures that a version embeds, and what is made of their features."""

    version: Version
    pictures: Pictures
    finish: Callable[[Tensor | None], Any]
    """Of the features [B, D] of these pictures; of None where the version embeds none alone."""


@dataclass(frozen=True)
class _Ticket:
    job: Job
    most: int
    """Pictures that may go through the network with it; 0: the version embeds none alone"""
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


@dataclass(frozen=True)
class _Outcome:
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

    def settle(self) -> None:
        """Where the future lives, unless its client has gone."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


@dataclass
class Desk:
    """Takes jobs from the event loop; its threads work them off, the oldest first.

    There is no waiting for company: a job that comes to an idle desk is done at once, and under
    load the queue itself makes the batches. What a job comes to does not depend on its thread.
    """

    most_waiting: int
    threads: int
    """Of one pass"""
    passes: int = 1
    """Passes that run at once"""
    most_seconds: float = math.inf
    """That a thread works before it is taken for hung"""
    on_pass: Callable[[int], None] = lambda rows: None
    """Told how many pictures went through the network together."""
    _line: deque[_Ticket] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    """Guards the line."""
    _ending: bool = False
    _workers: list[threading.Thread] = field(default_factory=list)
    _waiting: int = 0
    _begun: dict[str, float] = field(default_factory=dict)
    """When each thread that is at work began"""

    def start(self) -> None:
        """Begin to work, or begin again."""
        self._ending = False
        self._workers = [
            threading.Thread(target=self._work, name=f"desk-{number}", daemon=True)
            for number in range(self.passes)
        ]
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Finish what waits, then end."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    @property
    def works(self) -> bool:
        """Whether its threads are all there, or have yet to be started."""
        return all(worker.is_alive() for worker in self._workers)

    @property
    def trouble(self) -> str | None:
        """Why answers do not come as they should, and will not before the process is replaced."""
        if not self.works:
            return "a thread that runs the network has ended"
        seconds = time.monotonic() - min(list(self._begun.values()), default=math.inf)
        if seconds > self.most_seconds:
            return f"the network has been at work on the same pictures for {seconds:.0f} s"
        return None

    @property
    def waiting(self) -> int:
        """Jobs that wait or are being done."""
        return self._waiting

    def check_room(self) -> None:
        """Raises Problem 503: too many jobs wait."""
        if self._waiting >= self.most_waiting:
            detail = f"the model is busy: {self._waiting} requests wait. Try again in a moment."
            raise Problem(503, detail, retry_after=_RETRY_SECONDS)

    async def do(self, job: Job) -> Any:
        """What the job's `finish` returns or raises.

        Raises:
            Problem: 503, too many jobs wait.
        """
        self.check_room()
        loop, version = asyncio.get_running_loop(), job.version
        most = _PASSES_TOGETHER * version.rows_per_pass if version.embeds_alone else 0
        ticket = _Ticket(job, most, loop, loop.create_future())
        self._waiting += 1
        try:
            with self._changed:
                self._line.append(ticket)
                self._changed.notify()
            return await ticket.future
        finally:
            self._waiting -= 1

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        name = threading.current_thread().name
        while together := self._next():
            if wanted := [ticket for ticket in together if not ticket.future.cancelled()]:
                self._begun[name] = time.monotonic()
                self._do(wanted)
                del self._begun[name]

    def _next(self) -> list[_Ticket]:
        """The oldest job, and those behind it that fill its passes; none that would begin one more.

        Empty at the end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._ending)
            if not self._line:
                return []
            together = [self._line.popleft()]
            version, rows = together[0].job.version, len(together[0].job.pictures)
            while self._line and self._line[0].job.version is version:
                rows += len(self._line[0].job.pictures)
                if rows > together[0].most:
                    break
                together.append(self._line.popleft())
        return together

    def _do(self, together: list[_Ticket]) -> None:
        """All are told at once: an event loop that is woken for each of them takes the interpreter
        away from the others' work (2.7 ms a job instead of 0.3, two cores)."""
        outcomes = self._outcomes(together)

        def settle() -> None:
            for outcome in outcomes:
                outcome.settle()

        together[0].loop.call_soon_threadsafe(settle)

    def _outcomes(self, together: list[_Ticket]) -> list[_Outcome]:
        sizes = [len(ticket.job.pictures) for ticket in together]
        features: Sequence[Tensor | None] = [None] * len(together)
        try:
            self.on_pass(sum(sizes))
            if together[0].most:
                every = np.concatenate([one.job.pictures for one in together])
                with torch.no_grad():
                    features = torch.split(together[0].job.version.embed(every), sizes)
        except Exception as error:  # the clients are told; the desk goes on
            return [_Outcome(ticket.future, error=error) for ticket in together]
        return [_finished(ticket, own) for ticket, own in zip(together, features, strict=True)]


def _finished(ticket: _Ticket, features: Tensor | None) -> _Outcome:
    try:
        return _Outcome(ticket.future, ticket.job.finish(features))
    except Exception as error:  # this client is told; the others have their answers
        return _Outcome(ticket.future, error=error)
