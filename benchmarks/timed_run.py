"""A worker of `benchmarks.faults`: meta-training with clocks around what it does for faults."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.core.config import Section
from pipeline.runtime.context import Context
from pipeline.runtime.metric_log import JournalLog
from pipeline.training import loop, meta_train, steps
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.stragglers import Stragglers


class Timed(Section):
    """A run whose clocks are read."""

    job: MetaTrainJob


def timed(config: Timed, context: Context) -> dict[str, float]:
    """The entry of every worker: seconds by what they were spent on, of the main one."""
    spent: dict[str, float] = defaultdict(float)
    targets = [
        (loop.Keeper, "save", "checkpoints"),
        (JournalLog, "flush", "checkpoints"),
        (Context, "wait_for_main", "waits behind checkpoints and validations"),
        (Context, "wait_for_all", "waits behind checkpoints and validations"),
        (loop, "check_agreement", "comparing the workers"),
        (loop, "_incident", "incidents and stragglers"),
        (Stragglers, "look", "incidents and stragglers"),
        (steps, "mean_norm", "incidents and stragglers"),
    ]
    with _clocks(targets, spent):
        begin = time.perf_counter()
        meta_train.run(config.job, context)
        spent["everything"] = time.perf_counter() - begin
    return dict(spent)


@contextmanager
def _clocks(targets: list[tuple[Any, str, str]], spent: dict[str, float]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    for owner, name, what in targets:
        setattr(owner, name, _clocked(getattr(owner, name), what, spent))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _clocked(
    function: Callable[..., Any], what: str, spent: dict[str, float]
) -> Callable[..., Any]:
    def clocked(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[what] += time.perf_counter() - begin

    return clocked
