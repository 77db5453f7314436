"""Which worker lives: each one's heartbeat, waits that end without it, and the roll call."""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import Store

from pipeline.runtime.faults import HungPeerError

_POLL_SECONDS = 0.15
_MOST_SECONDS_BETWEEN_BEATS, _LOOK_SECONDS = 2.0, 0.5
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.002, 0.05
_PATIENCE_SECONDS = 0.6  # four times what a worker that lives takes to hear the call
_STORE_PATIENCE_SECONDS = 1.5
"""So long the store may have said nothing before its host is taken for the one that is stopped."""
_LEAST_PATIENCE_SECONDS = 0.6


class Pulse:
    """Tells the others from a thread of its own that this worker lives, and answers roll calls.

    A process that is stopped, or whose machine is gone, does not answer. One that lives answers
    with the step that it is at, so that the one which everybody waits for is known; and it writes
    the stacks of its threads to its log. The first worker may hold the store in its own process:
    then nobody is answered when it is stopped.

    Args:
        timeout_seconds: a worker without a heartbeat for so long is given up.
        store_is_with: the worker in whose process the store is; None where it is a file.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float = 60.0,
        store_is_with: int | None = 0,
    ) -> None:
        self.step = 0
        """How far this worker is."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_seconds, self._store_is_with = timeout_seconds, store_is_with
        self._between_beats = min(_MOST_SECONDS_BETWEEN_BEATS, timeout_seconds / 8)
        self._ended = threading.Event()
        self._answered = threading.Lock()
        self._heard = time.monotonic()
        """When the store last answered the thread that listens."""
        self._thread = threading.Thread(target=self._listen, daemon=True, name="pulse")
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._ended.set()
        self._thread.join(2 * _POLL_SECONDS)

    def wait(self, arrived: Callable[[], bool], what: str, most_seconds: float) -> None:
        """Wait until something has arrived in the store, while all workers live.

        The store is asked by another thread, since it may never answer.

        Raises:
            HungPeerError: a worker has shown no sign of life for the timeout; or it took too long.
            RuntimeError: the store has gone.
        """
        seen = _Seen(self._world_size)
        asker = threading.Thread(target=self._ask, args=(arrived, seen), daemon=True, name="wait")
        asker.start()
        deadline = time.monotonic() + most_seconds
        while not seen.ended.wait(min(_LOOK_SECONDS, self._between_beats)):
            if (quiet := seen.seconds_of_silence()) > self._timeout_seconds:
                seen.given_up = True
                why = f"no sign of life for {quiet:.3g} s"
            elif time.monotonic() > deadline:
                seen.given_up = True
                why = f"not done within {most_seconds:g} s"
            else:
                continue
            raise HungPeerError(f"{what}, at step {self.step}: {why}: {self.roll_call()}")
        if seen.error is not None:
            raise seen.error

    def _ask(self, arrived: Callable[[], bool], seen: _Seen) -> None:
        pause, next_look = _FIRST_PAUSE_SECONDS, 0.0
        try:
            while not seen.given_up and not arrived():
                if time.monotonic() >= next_look:
                    self._look(seen)
                    next_look = time.monotonic() + self._between_beats / 2
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
        except RuntimeError as error:
            seen.error = error
        seen.ended.set()

    def _look(self, seen: _Seen) -> None:
        keys = [f"beat-{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            for rank, beat in enumerate(self._store.multi_get(keys)):
                seen.hear(rank, beat)
            return
        for rank, key in enumerate(keys):  # somebody's heart has not beaten yet
            if self._store.check([key]):
                seen.hear(rank, self._store.get(key))

    def roll_call(self) -> str:
        """Who does not answer, and else who is behind; soon, whatever the store does.

        The thread that listens has asked the store all the time: if it has waited for an answer for
        long, the call does not wait as long again.
        """
        found: list[str] = []
        reached = threading.Event()

        def call() -> None:
            try:
                self._answer()
                self._store.set("roll-call", str(self._rank))
                reached.set()
                found.append(self._call())
            except RuntimeError:  # the store's host has gone
                reached.set()

        caller = threading.Thread(target=call, daemon=True, name="roll call")
        caller.start()
        left = _STORE_PATIENCE_SECONDS - (time.monotonic() - self._heard)
        if reached.wait(max(_LEAST_PATIENCE_SECONDS, left)):
            caller.join(_STORE_PATIENCE_SECONDS)
        if found:
            return found[0]
        if self._store_is_with in (None, self._rank):
            return "the store by which the workers meet does not answer"
        return f"{missing([self._store_is_with])} not answer: stopped, or the machine is gone"

    def _call(self) -> str:
        keys = {rank: f"here-{rank}" for rank in range(self._world_size)}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.02)
        here = {
            r: json.loads(self._store.get(k)) for r, k in keys.items() if self._store.check([k])
        }
        if absent := [rank for rank in keys if rank not in here]:
            return f"{missing(absent)} not answer: stopped, or the machine is gone"
        most = max(here.values())
        behind = [rank for rank, step in here.items() if step < most]
        if behind:
            return f"{missing(behind)} not get on, at step {min(here.values())}"
        return f"all {self._world_size} workers answer, from step {most}: the network between them"

    def _listen(self) -> None:
        beats, next_beat = 0, 0.0
        while not self._ended.wait(min(_POLL_SECONDS, self._between_beats)):
            try:
                if time.monotonic() >= next_beat:
                    beats, next_beat = beats + 1, time.monotonic() + self._between_beats
                    self._store.set(f"beat-{self._rank}", str(beats))
                called = self._store.check(["roll-call"])
                self._heard = time.monotonic()
            except DistNetworkError:  # the store's host is gone: whoever trains will hear of it
                return
            except RuntimeError:  # a full disk, for a while
                continue
            if called:
                self._answer()
                return

    def _answer(self) -> None:
        if self._answered.acquire(blocking=False):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self._store.set(f"here-{self._rank}", json.dumps(self.step))


@dataclass
class _Seen:
    """What a wait has seen of the others."""

    world_size: int
    beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    """By rank: the newest heartbeat, and when it was new."""
    since: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)
    error: RuntimeError | None = None
    given_up: bool = False

    def hear(self, rank: int, beat: bytes) -> None:
        """Note a heartbeat, which may be the one that is known."""
        if rank not in self.beats or self.beats[rank][0] != beat:
            self.beats[rank] = (beat, time.monotonic())

    def seconds_of_silence(self) -> float:
        """Of the worker that has been silent for longest."""
        heard = dict(self.beats)
        last = [heard[rank][1] if rank in heard else self.since for rank in range(self.world_size)]
        return time.monotonic() - min(last)


def missing(ranks: list[int]) -> str:
    """The subject of what these workers do not do."""
    names = ", ".join(map(str, ranks))
    return f"worker {names} does" if len(ranks) == 1 else f"workers {names} do"
