"""The one thread that runs the network: whatever waits while it is busy is embedded together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.deploy.serve.model import Answers, Pictures, Ready, Version
from pipeline.deploy.serve.problems import Problem

_PASSES_TOGETHER = 4
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Learn:
    """Learn a support set."""

    version: Version
    pictures: Pictures
    labels: Sequence[int]
    num_ways: int

    def do(self) -> Ready:
        """In the desk's thread."""
        return self.version.learn(self.pictures, self.labels, self.num_ways)


@dataclass(frozen=True)
class Ask:
    """Answer queries."""

    version: Version
    ready: Ready
    pictures: Pictures


@dataclass(frozen=True)
class _Ticket:
    job: Learn | Ask
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def resolve(self, settle: Callable[[], None]) -> None:
        """Settle the future where it lives, unless its client has gone."""
        self.loop.call_soon_threadsafe(lambda: None if self.future.done() else settle())


@dataclass
class Desk:
    """Takes jobs from the event loop; one thread works them off in order.

    There is no waiting for company: a job that comes to an idle desk is done at once, and under
    load the queue itself makes the batches.
    """

    most_waiting: int
    threads: int
    on_pass: Callable[[int], None] = lambda rows: None
    """Told how many pictures went through the network together."""
    _queue: queue.SimpleQueue[_Ticket | None] = field(default_factory=queue.SimpleQueue)
    _held: _Ticket | None = None
    _waiting: int = 0

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, then end."""
        self._queue.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that wait or are being done."""
        return self._waiting

    async def learn(self, job: Learn) -> Ready:
        """Raises Problem 503 when too many wait."""
        ready: Ready = await self._put(job)
        return ready

    async def ask(self, job: Ask) -> Answers:
        """Raises Problem 503 when too many wait."""
        answers: Answers = await self._put(job)
        return answers

    async def _put(self, job: Learn | Ask) -> Any:
        if self._waiting >= self.most_waiting:
            detail = f"the model is busy: {self._waiting} requests wait. Try again in a moment."
            raise Problem(503, detail, retry_after=_RETRY_SECONDS)
        loop = asyncio.get_running_loop()
        ticket = _Ticket(job, loop, loop.create_future())
        self._waiting += 1
        try:
            self._queue.put(ticket)
            return await ticket.future
        finally:
            self._waiting -= 1

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        while (first := self._next()) is not None:
            if isinstance(first.job, Learn):
                self._settle(first, first.job.do)
            else:
                self._answer(self._company(first, first.job))

    def _next(self) -> _Ticket | None:
        held, self._held = self._held, None
        return held or self._queue.get()

    def _company(self, first: _Ticket, job: Ask) -> list[tuple[_Ticket, Ask]]:
        """The first question, and those behind it that can share its passes."""
        together, rows = [(first, job)], len(job.pictures)
        most = _PASSES_TOGETHER * job.version.rows_per_pass
        while job.version.embeds_alone and rows < most and not self._queue.empty():
            ticket = self._queue.get()
            if ticket is None:
                self._queue.put(None)
                break
            other = ticket.job
            if not isinstance(other, Ask) or other.version is not job.version:
                self._held = ticket
                break
            if not ticket.future.cancelled():
                together.append((ticket, other))
                rows += len(other.pictures)
        return together

    def _answer(self, together: list[tuple[_Ticket, Ask]]) -> None:
        version = together[0][1].version
        sizes = [len(ask.pictures) for _, ask in together]
        self.on_pass(sum(sizes))
        features: Sequence[torch.Tensor | None] = [None] * len(together)
        if version.embeds_alone:
            try:
                pictures = np.concatenate([ask.pictures for _, ask in together])
                with torch.no_grad():
                    features = torch.split(version.embed(pictures), sizes)
            except Exception as error:
                for ticket, _ in together:
                    self._fail(ticket, error)
                return
        for (ticket, ask), own in zip(together, features, strict=True):
            self._settle(ticket, partial(version.answer, ask.ready, ask.pictures, own))

    def _settle(self, ticket: _Ticket, compute: Callable[[], Any]) -> None:
        try:
            result = compute()
        except Exception as error:  # the client is told; the desk goes on
            self._fail(ticket, error)
            return
        ticket.resolve(lambda: ticket.future.set_result(result))

    def _fail(self, ticket: _Ticket, error: Exception) -> None:
        ticket.resolve(lambda: ticket.future.set_exception(error))
