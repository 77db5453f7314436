"""A wish to stop, at any moment: nothing is lost, and the end is that of a run nobody stopped."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import StoppedError
from pipeline.engine.learner import Learner
from pipeline.evaluation import scoring
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.collectives import stop_together
from pipeline.runtime.context import SINGLE, Context
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.tasks.frozen import read_episodes
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.state import TrainState
from tests.unit.quadratic import Quadratic
from tests.unit.test_scoring import NearestCentroid, learner

_STEPS, _ASKS_OF_A_STEP = 30, 5
_CONFIG = OuterConfig(num_steps=_STEPS, checkpoint_every=4, validate_every=6, warmup_steps=0)


def train(folder: Path, context: Context) -> TrainState:
    def validate(learner: Learner, step: int) -> tuple[float, Learner]:
        stop_together(context, "a test")
        return -float(learner.params["w"].norm()), learner

    program, start = Quadratic(noise=0.3, spread=0.5), {"w": torch.tensor([3.0, 4.0])}
    places = {"checkpoints": folder / "checkpoints", "journal": folder / "journal.jsonl"}
    return optimise(program, start, _CONFIG, validate, context, **places, label="test")


def asked_at(ask: int) -> Context:
    """A worker that learns of the wish when it looks for the `ask`-th time."""
    count = itertools.count()
    return replace(SINGLE, stopping=lambda: next(count) >= ask)


@pytest.mark.parametrize("pause", [1, 4, 5, 6, 7, 16, 31, 32, 33])
def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_is_not(
    pause: int, tmp_path: Path
) -> None:
    """Behind a step, before its validation, in the midst of it: no step is done twice or left out."""
    whole, reached = train(tmp_path / "whole", SINGLE), [0]
    for _ in range(2 * _STEPS):
        try:
            state = train(tmp_path / "stopped", asked_at(pause))
        except StoppedError as error:
            said = str(error)
        else:
            break
        reached.append(newest_step(tmp_path / "stopped" / "checkpoints"))
        assert said == f"stopped behind the checkpoint of step {reached[-1]}"
        steps = [point.step for point in points(tmp_path / "stopped") if "loss" in point.metrics]
        assert max(steps) == reached[-1], "every step that was told of is kept"
        assert reached[-1] > reached[-2] or reached[-1] % 6 == 0
    assert len(reached) > _STEPS // (2 + pause // _ASKS_OF_A_STEP)
    assert torch.equal(state.vector, whole.vector) and state.progress == whole.progress
    assert state.best is not None and whole.best is not None
    assert (state.best.step, state.best.val_accuracy) == (whole.best.step, whole.best.val_accuracy)
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")


def points(folder: Path) -> list[Any]:
    return [point for point, _ in read_points(folder / "journal.jsonl")]


def told(folder: Path) -> set[tuple[int, str, float]]:
    """What the journal holds of the numbers that a run's speed does not change."""
    steady = ("loss", "val_accuracy", "lr")
    return {(p.step, n, v) for p in points(folder) for n, v in p.metrics.items() if n in steady}


def test_an_evaluation_ends_between_two_chunks_of_episodes(
    blob_store: Store, blob_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_EPISODES_PER_CHUNK", 4)
    episodes = next(iter(read_episodes(blob_tasks, "val").values()))
    one = learner(blob_store, NearestCentroid())
    done: list[int] = []
    context = replace(SINGLE, stopping=lambda: len(done) >= 2)
    with pytest.raises(StoppedError, match="stopped in an evaluation, as asked"):
        scoring.score(one, blob_store, episodes, context=context, advance=done.append)
    assert done == [4, 4] and len(episodes.support_rows) > 8
