"""What the journal says of a run's pace, and of its waiting for data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.training import feed as feed_module
from pipeline.training.feed import Feed, Key
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.pace import Pace
from tests.unit.test_loop_guards import Quadratic


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_is_loaded_meanwhile_is_not_waited_for(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only loading moves: by one for each batch, when the test lets it."""
    clock = [0.0]
    monkeypatch.setattr(feed_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    allowed, loaded = threading.Semaphore(0), threading.Semaphore(0)

    def load(keys: Iterator[Key]) -> Iterator[Key]:
        for key in keys:
            assert allowed.acquire(timeout=20)
            clock[0] += 1
            loaded.release()
            yield key

    with Feed(load, lambda key: key, range(1), ahead=ahead) as feed:
        allowed.release()
        assert feed.take(0, 0) == (0, 0)
        assert feed.waited_seconds == 1, "there was nothing to load it before"
        for position in range(1, 4):
            allowed.release()
            if ahead:
                for _ in range(2 if position == 1 else 1):
                    assert loaded.acquire(timeout=20), "not loaded ahead"
            assert feed.take(position, 0) == (position, 0)
        assert feed.waited_seconds == (1 if ahead else 4)
        allowed.release()  # the thread may be at its next batch


def test_pace_counts_from_the_last_validation() -> None:
    now, waited = [100.0], [7.0]
    pace = Pace("tasks", lambda: waited[0], lambda: now[0])
    now[0], waited[0] = 102.0, 7.5
    assert pace.count(8) == {"tasks_per_second": 4.0, "data_wait_fraction": 0.25}
    now[0] = 104.0
    assert pace.count(8) == {"tasks_per_second": 4.0, "data_wait_fraction": 0.125}
    now[0], waited[0] = 1000.0, 8.0  # a validation
    pace.restart()
    now[0] = 1001.0
    assert pace.count(8) == {"tasks_per_second": 8.0, "data_wait_fraction": 0.0}


def test_the_journal_holds_the_rates_and_the_history_does_not(tmp_path: Path) -> None:
    state = optimise(
        Quadratic(),
        {"w": torch.tensor([3.0, 4.0])},
        OuterConfig(num_steps=30, validate_every=10),
        lambda learner, step: (0.5, learner),
        SINGLE,
        checkpoints=tmp_path / "checkpoints",
        journal=tmp_path / "journal.jsonl",
        label="test",
    )
    points = [point for point, _ in read_points(tmp_path / "journal.jsonl")]
    assert [point.step for point in points] == list(range(1, 31))
    for point in points:
        assert 0 < point.metrics["data_wait_fraction"] < 1
        assert point.metrics["tasks_per_second"] > 0
    for entry in state.progress.history:
        assert not {"tasks_per_second", "data_wait_fraction"} & set(entry)
