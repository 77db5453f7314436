"""What a launcher does: run one entry on N workers and return what the first one returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.runtime.context import default_num_workers

LOST_PEER = 5
"""Exit status of a worker whose peer went away: the peer has the story, not this one."""


class Job(NamedTuple):
    """One distributed run."""

    entry: str
    """`module:function`, called on every worker as function(config, context) -> JSON value"""
    config: Section
    num_workers: int


class Launcher(Protocol):
    """Starts the workers of a job, wherever they run."""

    def __call__(self, job: Job, folder: Path) -> Any:
        """Run to the end and return the first worker's result; `folder` is for its own files.

        Raises:
            PipelineError: a worker failed; the message is that worker's.
        """


def num_workers_from_environment(most: int) -> int:
    """METALOOM_NUM_WORKERS, or one worker for each GPU, or else for each physical core.

    Args:
        most: more workers than this would have nothing to do; the default stays below it, and a
            number that was asked for is left as it is, for the run to refuse.

    Raises:
        ConfigError: the variable is not a positive whole number.
    """
    value = os.environ.get("METALOOM_NUM_WORKERS", "")
    if not value:
        return min(default_num_workers(), most)
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"METALOOM_NUM_WORKERS is {value!r}. Set it to a positive whole number, or unset it to "
            f"use {default_num_workers()}."
        )
    return int(value)
