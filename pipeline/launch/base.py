"""What a launcher does: run one entry on N workers and return what the first one returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.runtime.context import default_num_workers

FINAL, BUG, ORPHAN, LOST_PEER, FAULT, REFUSED, STOPPED = 1, 3, 4, 5, 6, 74, 75
"""How a worker ends other than well: with an error that no new start would mend; with a mistake of
ours; without a launcher; because a peer went away, who has the story; with a fault that it names;
because its disk takes nothing, not even an error; behind a checkpoint, because it was asked to."""


class Job(NamedTuple):
    """One distributed run."""

    entry: str
    """`module:function`, called on every worker as function(config, context) -> JSON value"""
    config: Section
    num_workers: int
    """The most workers; with `min_workers` fewer will do"""
    min_workers: int | None = None
    """Go on with as few as these when machines are missing; None waits for all"""
    max_restarts: int = 0
    """Starts in a row from one checkpoint, beside the first, before the run is given up"""
    outputs: tuple[Path, ...] = ()
    """Folders that the main worker leaves, to be brought to the driver from wherever that was"""
    most_workers: int | None = None
    """How many can share the work, on all hosts together; None: any number"""


class Launcher(Protocol):
    """Starts the workers of a job, wherever they run."""

    def __call__(self, job: Job, folder: Path) -> Any:
        """Run to the end and return the first worker's result; `folder` is for its own files.

        Raises:
            PipelineError: a worker failed; the message is that worker's.
        """


def num_workers_from_environment(most: int) -> tuple[int | None, int]:
    """METALOOM_NUM_WORKERS (`4`, or elastic `2:4`), or one worker for each GPU, or physical core.

    Args:
        most: more workers than this would have nothing to do; the default stays below it, and a
            number that was asked for is left as it is, for the run to refuse.

    Returns:
        The least number of workers (None: all of them) and the most.

    Raises:
        ConfigError: the variable is not a positive whole number, or two of them.
    """
    value = os.environ.get("METALOOM_NUM_WORKERS", "")
    if not value:
        return None, min(default_num_workers(), most)
    return bounds_from_environment("METALOOM_NUM_WORKERS", value)


def bounds_from_environment(name: str, value: str) -> tuple[int | None, int]:
    """`4` as (None, 4), `2:4` as (2, 4).

    Raises:
        ConfigError: it is neither.
    """
    low, colon, high = value.partition(":")
    numbers = [
        int(part) if part.isdecimal() and len(part) < 7 else 0
        for part in ((low, high) if colon else (low,))
    ]
    if min(numbers) < 1 or numbers != sorted(numbers):
        raise ConfigError(
            f"{name} is {value!r}. Set it to a positive whole number, or to two with a colon "
            "between them (2:4: at least 2, at most 4), or unset it."
        )
    return (numbers[0] if colon else None), numbers[-1]


def max_restarts_from_environment() -> int:
    """METALOOM_MAX_RESTARTS, or 3.

    Raises:
        ConfigError: it is no whole number.
    """
    value = os.environ.get("METALOOM_MAX_RESTARTS") or "3"
    if not value.isdecimal() or len(value) > 6:
        raise ConfigError(
            f"METALOOM_MAX_RESTARTS is {value!r}. Set it to a whole number (0: never start the "
            "workers again), or unset it for 3."
        )
    return int(value)
