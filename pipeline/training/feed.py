"""Batches on the device when their turn comes: in order, ahead of time, restarted where needed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

_CLOSE_SECONDS = 5.0

Key = tuple[int, int]
"""(position, group)"""
Host = TypeVar("Host")
Ready = TypeVar("Ready")


class Feed(Generic[Host, Ready]):
    """Batches in the order in which a worker asks: its groups of one position, then of the next.

    What comes for a (position, group) depends on these two alone: a feed that is asked for another
    one than the next (after a rollback, or in a resumed run) starts again there.

    With `ahead`, one background thread loads that many batches before they are asked for. It
    touches host memory only: every call of the device comes from the thread that trains, so it
    cannot disturb a graph capture or the order of the streams.
    """

    def __init__(
        self,
        load: Callable[[Iterator[Key]], Iterator[Host]],
        land: Callable[[Host], Ready],
        groups: Sequence[int],
        *,
        ahead: int,
    ) -> None:
        """Nothing is loaded, and no thread started, before the first batch is asked for.

        Args:
            load: the batches of an endless line of keys, in host memory; pure in each key.
            land: brings one to the device, without waiting for the device.
            groups: those that this worker owns.
            ahead: batches to load in the background; 0 loads each when it is asked for.
        """
        self.groups = groups
        self.waited_seconds = 0.0
        """Time that callers of `take` have spent in it."""
        self._load, self._land, self._ahead = load, land, ahead
        self._next: Key | None = None
        self._source: _Inline[Host] | _Background[Host] | None = None

    def take(self, position: int, group: int) -> Ready:
        """The batch of one of this worker's groups; what loading it raises is raised here."""
        start = time.perf_counter()
        if self._source is None or self._next != (position, group):
            self.close()
            self._source = self._open(position, group)
        try:
            batch = self._land(self._source.take())
        except BaseException:
            self.close()
            raise
        self._next = self._after(position, group)
        self.waited_seconds += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """End the thread; a later `take` would start one again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> Feed[Host, Ready]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, position: int, group: int) -> _Inline[Host] | _Background[Host]:
        batches = self._load(self._line(position, group))
        return _Background(batches, self._ahead) if self._ahead else _Inline(batches)

    def _line(self, position: int, group: int) -> Iterator[Key]:
        while True:
            yield position, group
            position, group = self._after(position, group)

    def _after(self, position: int, group: int) -> Key:
        place = self.groups.index(group) + 1
        last = place == len(self.groups)
        return (position + 1, self.groups[0]) if last else (position, self.groups[place])


class _Inline(Generic[Host]):
    """Each batch is loaded when it is asked for."""

    def __init__(self, batches: Iterator[Host]) -> None:
        self._batches = batches

    def take(self) -> Host:
        return next(self._batches)

    def close(self) -> None:
        """Nothing is under way."""


class _Background(Generic[Host]):
    """A thread that keeps up to `ahead` batches waiting; a daemon, so it never holds a process."""

    def __init__(self, batches: Iterator[Host], ahead: int) -> None:
        self._batches = batches
        self._free = threading.Semaphore(ahead)
        self._loaded: queue.SimpleQueue[tuple[Host] | BaseException] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="feed")
        self._thread.start()

    def take(self) -> Host:
        found = self._loaded.get()
        self._free.release()
        if isinstance(found, BaseException):
            raise found
        return found[0]

    def close(self) -> None:
        """Wait for the thread's end, though not for ever: it may hang in a read of a dead disk."""
        self._stopped = True
        self._free.release()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while self._free.acquire() and not self._stopped:
                self._loaded.put((next(self._batches),))
        except BaseException as error:  # whatever it is, the thread that trains has to hear of it
            self._loaded.put(error)
