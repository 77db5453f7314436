"""Which worker does not answer: asked when a collective has timed out, at no cost before."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import threading
import time

from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.25
_PATIENCE_SECONDS = 1.0
_STORE_PATIENCE_SECONDS = 3.0


class Pulse:
    """Answers roll calls of other workers from a thread of its own, and calls them.

    A process that is stopped, or whose machine is gone, does not answer. One that lives answers
    with the step that it is at, so that the one which everybody waits for is known; and it writes
    the stacks of its threads to its log. The first worker may hold the store in its own process:
    then nobody is answered when it is stopped.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.step = 0
        """How far this worker is."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._ended = threading.Event()
        self._answered = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="pulse")
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._ended.set()
        self._thread.join(2 * _POLL_SECONDS)

    def roll_call(self) -> str:
        """Who does not answer, and else who is behind; soon, whatever the store does."""
        found: list[str] = []

        def call() -> None:
            with contextlib.suppress(RuntimeError):  # the store's host has gone
                found.append(self._call())

        caller = threading.Thread(target=call, daemon=True, name="roll call")
        caller.start()
        caller.join(_STORE_PATIENCE_SECONDS)
        return found[0] if found else "worker 0 does not answer: stopped, or the machine is gone"

    def _call(self) -> str:
        self._answer()
        self._store.set("roll-call", str(self._rank))
        keys = {rank: f"here-{rank}" for rank in range(self._world_size)}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.02)
        here = {
            r: json.loads(self._store.get(k)) for r, k in keys.items() if self._store.check([k])
        }
        if absent := [rank for rank in keys if rank not in here]:
            return f"{_workers(absent)} not answer: stopped, or the machine is gone"
        most = max(here.values())
        behind = [rank for rank, step in here.items() if step < most]
        if behind:
            return f"{_workers(behind)} not get on, at step {min(here.values())}"
        return f"all {self._world_size} workers answer, from step {most}: the network between them"

    def _listen(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                called = self._store.check(["roll-call"])
            except RuntimeError:  # the store's host is gone: whoever trains will hear of it
                return
            if called:
                self._answer()
                return

    def _answer(self) -> None:
        if self._answered.acquire(blocking=False):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self._store.set(f"here-{self._rank}", json.dumps(self.step))


def _workers(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"worker {names} does" if len(ranks) == 1 else f"workers {names} do"
