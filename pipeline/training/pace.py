"""How fast a run trains, and how much of that time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Rates since the last validation; validation itself is left out, all else of a step counts.

    Times differ from run to run, so they go to the journal and the bar, never into an artefact.
    """

    def __init__(
        self, unit: str, waited: Callable[[], float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start counting.

        Args:
            unit: plural name of an item, such as "tasks".
            waited: seconds that the run has waited for data so far.
            clock: seconds.
        """
        self._unit, self._waited, self._clock = unit, waited, clock
        self.restart()

    def restart(self) -> None:
        """Forget what was: the next stretch begins now."""
        self._start, self._waited_before, self._items = self._clock(), self._waited(), 0

    def count(self, items: int) -> dict[str, float]:
        """Count finished items; returns `<unit>_per_second` and `data_wait_fraction`."""
        self._items += items
        seconds = max(self._clock() - self._start, 1e-9)
        return {
            f"{self._unit}_per_second": self._items / seconds,
            "data_wait_fraction": (self._waited() - self._waited_before) / seconds,
        }
