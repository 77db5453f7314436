"""Who is slow, and why, from the times of steps alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.context import Context
from pipeline.training.stragglers import RATIO, WINDOW, Stragglers


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_context(world_size: int, rank: int = 0) -> Context:
    return Context(rank=rank, world_size=world_size, device=torch.device("cpu"))


def look(
    watch: Stragglers, steps: int, seconds: list[float], waited: list[float] | None = None
) -> dict[str, float]:
    told: dict[str, float] = {}
    for _ in range(steps):
        told = watch.look(seconds, waited or [0.0] * len(seconds))
    return told


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_the_slow_worker_is_named_once_there_are_enough_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Eight groups on four workers; the third takes twice as long for each of its two."""
    watch = Stragglers(8, a_context(4), Clock())
    seconds = [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1]
    assert look(watch, WINDOW - 1, seconds) == {}
    assert said(capsys) == []
    assert look(watch, 1, seconds) == {"slowest_worker_ratio": pytest.approx(2.0)}
    (line,) = said(capsys)
    assert (line["event"], line["worker"]) == ("straggler", 2)
    assert line["why"].startswith("computes")
    assert line["seconds_a_group"] == pytest.approx(0.2)
    assert line["others_seconds"] == pytest.approx(0.1)


def test_a_worker_that_waits_for_its_data_is_told_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = Stragglers(4, a_context(2), Clock())
    look(watch, WINDOW, [0.1] * 4, [0.0, 0.0, 0.4, 0.4])
    (line,) = said(capsys)
    assert (line["worker"], line["why"]) == (1, "waits for its data: a slow disk?")


def test_a_worker_alone_is_named_where_it_waits_for_its_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert look(Stragglers(2, a_context(1), Clock()), WINDOW, [0.1, 0.1], [0.3, 0.3]) == {}
    (line,) = said(capsys)
    assert line["worker"] == 0 and "others_seconds" not in line
    look(Stragglers(2, a_context(1), Clock()), WINDOW, [0.1, 9.0])
    assert said(capsys) == []


def test_it_is_said_at_most_twice_a_minute_and_by_the_main_worker(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock, seconds = Clock(), [0.1, 0.5]
    watch = Stragglers(2, a_context(2), clock)
    lines = 0
    for _ in range(10 * 60):  # ten minutes, a step a second
        look(watch, 1, seconds)
        clock.now += 1.0
        lines += len(said(capsys))
    assert lines == 20
    look(Stragglers(2, a_context(2, rank=1), Clock()), 3 * WINDOW, seconds)
    assert said(capsys) == []


def test_what_is_slow_for_a_moment_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Stragglers(2, a_context(2), Clock())
    look(watch, WINDOW, [0.1, 0.1])
    look(watch, WINDOW // 2 - 1, [0.1, 9.0])
    assert said(capsys) == []
    look(watch, 2, [0.1, 9.0])
    assert [line["worker"] for line in said(capsys)] == [1]
    assert look(watch, WINDOW, [0.1, 0.1])["slowest_worker_ratio"] == pytest.approx(1.0)


@given(
    num_groups=st.integers(1, 12),
    world_size=st.integers(1, 12),
    pace=st.floats(1e-4, 10),
    jitter=st.lists(st.floats(0.9, 1.1), min_size=12, max_size=12),
)
def test_workers_with_more_groups_are_no_stragglers(
    num_groups: int, world_size: int, pace: float, jitter: list[float]
) -> None:
    """Five groups on four workers: one has two, and is not slow for that."""
    world_size = min(num_groups, world_size)
    watch = Stragglers(num_groups, a_context(world_size), Clock())
    told = look(watch, WINDOW, [pace * j for j in jitter[:num_groups]])
    assert told.get("slowest_worker_ratio", 1.0) < RATIO
