"""NaN guard, spike guard, early stop: on a program whose numbers are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.core.errors import TrainingError
from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.engine.meta_gradient import GroupGradient
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.runtime.context import SINGLE
from pipeline.training.feed import Feed, Key
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.state import TrainState


@dataclass(frozen=True)
class Model:
    statistics: None = None


@dataclass(frozen=True)
class Stub:
    """Stands where a learner would: holds the parameters that are to be validated."""

    params: Params
    model: Model = Model()


@dataclass(frozen=True)
class Quadratic:
    """Loss |w|^2 / 2 per item, so that the gradient of a group of two items is 2 w.

    `scales` multiplies the gradient of single (position, group) cells: 100 makes a spike, nan a NaN.
    """

    scales: Mapping[tuple[int, int], float] = field(default_factory=dict)
    noise: float = 0.0
    """Each meta-batch's gradient is multiplied by exp(noise * z), z standard normal."""
    num_groups: int = 4
    items_per_group: int = 2
    ahead: int = 0
    unit: str = "tasks"

    def feed(self, groups: Sequence[int]) -> Feed[Key, Key]:
        return Feed(lambda keys: keys, lambda key: key, groups, ahead=self.ahead)

    def gradient(self, params: Params, batch: Key) -> GroupGradient:
        position, group = batch
        z = np.random.default_rng(position).standard_normal()
        scale = self.scales.get((position, group), 1.0) * math.exp(self.noise * z)
        loss = torch.full((2,), float((params["w"] ** 2).sum() / 2) * scale)
        return GroupGradient({"w": 2 * scale * params["w"]}, {"loss": loss, "accuracy": loss * 0})

    def learner(self, params: Params) -> Learner:
        return cast(Learner, Stub(params))


def train(folder: Path, program: Quadratic, validate: Any = None, **changes: Any) -> TrainState:
    config = OuterConfig(
        **{
            "num_steps": 60,
            "checkpoint_every": 10,
            "validate_every": 10,
            "warmup_steps": 0,
            **changes,
        }
    )
    by_norm = validate or (lambda learner, step: (-float(learner.params["w"].norm()), learner))
    start = {"w": torch.tensor([3.0, 4.0])}
    return optimise(
        program,
        start,
        config,
        by_norm,
        SINGLE,
        checkpoints=folder / "checkpoints",
        journal=None,
        label="test",
    )


def test_the_mean_gradient_and_its_norm_are_those_of_the_closed_form(tmp_path: Path) -> None:
    state = train(tmp_path, Quadratic(), num_steps=1)
    first = state.progress.history[0]
    assert first["gradient_norm"] == pytest.approx(5.0)  # |w| for w = (3, 4)
    assert first["loss"] == pytest.approx(12.5)


@pytest.mark.parametrize(("position", "group"), [(33, 2), (0, 0)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_task_stops_the_run_before_its_update(
    tmp_path: Path, position: int, group: int, poison: float
) -> None:
    first = (position * 4 + group) * 2
    expected = rf"non-finite numbers at step {position} \(meta-batch {position}\), tasks: {first}, {first + 1}\."
    with pytest.raises(TrainingError, match=expected):
        train(tmp_path, Quadratic({(position, group): poison}))
    saved = load_checkpoint(tmp_path / "checkpoints")
    kept = 0 if saved is None else saved.state["progress"]["step"]
    assert kept == position // 10 * 10
    if saved is not None:
        clean = train(tmp_path / "clean", Quadratic(), num_steps=60, max_rollbacks=0)
        assert clean.progress.step == 60
        assert torch.isfinite(saved.tensors["vector"]).all()


def test_a_spike_rolls_back_and_skips_the_window(tmp_path: Path) -> None:
    """It ends with the bits of a run whose stream never held the skipped meta-batches."""
    state = train(tmp_path / "a", Quadratic({(43, 1): 1e5}))
    assert state.progress.skipped == [[40, 44]]
    assert state.progress.ledger == [[0, 40], [44, 64]]
    assert (state.progress.step, state.progress.rollbacks) == (60, 1)
    clean = train(
        tmp_path / "b", Quadratic()
    )  # its meta-batches are all alike, so skipping is no loss
    assert torch.equal(state.vector, clean.vector)


def test_with_the_spike_guard_off_the_spike_goes_into_the_weights(tmp_path: Path) -> None:
    program = Quadratic({(43, 1): 1e5})
    guarded = train(tmp_path / "a", program)
    open_ = train(tmp_path / "b", program, spike_factor=1e30)
    assert not torch.equal(guarded.vector, open_.vector)
    assert open_.progress.rollbacks == 0


def test_too_many_spikes_stop_the_run(tmp_path: Path) -> None:
    program = Quadratic({(p, 0): 1e5 for p in (42, 47, 52)})
    with pytest.raises(TrainingError, match="after 2 rollbacks"):
        train(tmp_path, program, max_rollbacks=2)


def test_a_long_clean_run_raises_no_false_alarm(tmp_path: Path) -> None:
    """Gradient norms that vary by a factor of ten either way are no spikes; by 1,000, they are."""
    long = {"num_steps": 5000, "checkpoint_every": 500, "validate_every": 500, "patience": 99}
    rough = {**long, "lr": 1e-6}
    state = train(tmp_path / "a", Quadratic(noise=0.7), **rough)
    assert (state.progress.rollbacks, state.progress.skipped) == (0, [])
    with pytest.raises(TrainingError, match="rollbacks"):
        train(tmp_path / "b", Quadratic(noise=3.0), **rough)


def test_training_stops_early_and_says_why(tmp_path: Path) -> None:
    values = iter([0.5, 0.7, 0.6, 0.6, 0.65, 0.9])
    state = train(tmp_path, Quadratic(), lambda learner, step: (next(values), learner), patience=3)
    assert state.progress.step == 50
    assert state.progress.stopped == (
        "early stop at step 50: no better validation accuracy than 0.7000 of step 20 in 3 validations"
    )
    assert state.best is not None
    assert (state.best.step, state.best.val_accuracy) == (20, 0.7)


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path) -> None:
    best_at = 20
    state = train(
        tmp_path, Quadratic(), lambda learner, step: (float(step == best_at), learner), patience=99
    )
    assert state.best is not None
    reference = train(tmp_path / "b", Quadratic(), num_steps=60)
    assert state.best.step == best_at
    assert torch.equal(state.vector, reference.vector)
    assert not torch.equal(state.best.vector, state.vector)


def test_a_resumed_run_ends_with_the_same_state(tmp_path: Path) -> None:
    """Stopped by an error after 33 steps, then run again: the bits and the numbers of one run."""
    program = Quadratic({(33, 1): float("nan")})
    with pytest.raises(TrainingError):
        train(tmp_path / "a", program)
    resumed = train(tmp_path / "a", replace(program, scales={}))
    straight = train(tmp_path / "b", Quadratic())
    assert torch.equal(resumed.vector, straight.vector)
    assert resumed.progress == straight.progress


def test_a_long_gradient_is_scaled_down(tmp_path: Path) -> None:
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient."""
    state = train(tmp_path, Quadratic(), num_steps=1, max_gradient_norm=0.5)
    torch.testing.assert_close(state.moments.first, 0.1 * 0.5 * torch.tensor([0.6, 0.8]))
