"""How often the workers of a run may be started again: without end while the run gets on."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.errors import TrainingError


@dataclass(frozen=True)
class Attempts:
    """Starts in a row that found the same checkpoint."""

    progress: int = -1
    """Step of the checkpoint that the latest start found; 0 when there was none."""
    count: int = 0
    """Starts since then, that one included"""
    total: int = 0
    """Starts of this run by this launcher"""

    def begin(self, progress: int, *, counts: bool = True) -> Attempts:
        """One more start, at this checkpoint.

        Args:
            counts: nothing had failed when it does not; the first one counts anyway.
        """
        counts = counts or not self.total
        same = self.count + counts if progress == self.progress else 1
        return Attempts(progress, same, self.total + counts)

    def check(self, max_restarts: int, cause: str) -> None:
        """Refuse the start when those before it came to nothing.

        Raises:
            TrainingError: the run has been started again `max_restarts` times from one checkpoint,
                or at all where there are to be none.
        """
        if self.count <= max_restarts + 1 and (max_restarts or self.total <= 1):
            return
        tried = f" ({self.count - 1} starts from step {self.progress})" if max_restarts else ""
        raise TrainingError(
            f"{cause} Run the same command again: it resumes from the last checkpoint{tried}."
        )
