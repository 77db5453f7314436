"""Which worker the others wait for, and whether it computes or waits for its data."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.runtime.collectives import share
from pipeline.runtime.context import Context
from pipeline.runtime.logs import say

WINDOW = 16
"""Steps over which a worker's time is taken."""
RATIO = 1.5
"""A worker that takes so many times as long for a group as the others is named."""
_SAY_SECONDS = 30.0
_DATA_SHARE = 0.5


class Stragglers:
    """Keeps the times of the latest steps, by worker."""

    def __init__(
        self, num_groups: int, context: Context, clock: Callable[[], float] = time.monotonic
    ) -> None:
        world = context.world_size
        self._shares = [share(num_groups, rank, world) for rank in range(world)]
        self._times: list[deque[tuple[float, float]]] = [deque(maxlen=WINDOW) for _ in range(world)]
        self._is_main, self._clock = context.is_main, clock
        self._said = -math.inf

    def look(self, seconds: Sequence[float], waited: Sequence[float]) -> dict[str, float]:
        """Take note of a step; say, at most twice a minute, who is slow and why.

        Args:
            seconds: [G] that each group took to compute.
            waited: [G] that its worker waited for its data.

        Returns:
            `slowest_worker_ratio`, once there are enough steps and workers to tell.
        """
        for times, groups in zip(self._times, self._shares, strict=True):
            sums = sum(seconds[g] for g in groups), sum(waited[g] for g in groups)
            times.append((sums[0] / len(groups), sums[1] / len(groups)))  # shares may be uneven
        if len(self._times[0]) < WINDOW:
            return {}
        typical = [statistics.median(c + w for c, w in times) for times in self._times]
        waits = [statistics.median(w for _, w in times) for times in self._times]
        slowest = max(range(len(typical)), key=typical.__getitem__)
        others = [t for rank, t in enumerate(typical) if rank != slowest]
        ratio = typical[slowest] / max(statistics.median(others), 1e-9) if others else 1.0
        starved = waits[slowest] > _DATA_SHARE * typical[slowest]
        if ratio > RATIO or starved:
            self._say(slowest, typical[slowest], others, starved)
        return {"slowest_worker_ratio": ratio} if others else {}

    def _say(self, worker: int, seconds: float, others: list[float], starved: bool) -> None:
        now = self._clock()
        if not self._is_main or now - self._said < _SAY_SECONDS:
            return
        self._said = now
        usual = {"others_seconds": statistics.median(others)} if others else {}
        say(
            "straggler",
            worker=worker,
            seconds_a_group=seconds,
            **usual,
            why="waits for its data: a slow disk?" if starved else "computes: a busy machine?",
        )
