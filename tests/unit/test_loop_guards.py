"""NaN guard, spike guard, early stop: on a program whose numbers are known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import TrainingError
from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.engine.meta_gradient import GroupGradient
from pipeline.runtime.agreement import kinds_of_machines
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.runtime.context import SINGLE, fingerprint
from pipeline.runtime.faults import DivergenceError
from pipeline.training import loop, steps
from pipeline.training.adam import adam_step, zero_moments
from pipeline.training.feed import Key
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.schedules import warmup_cosine
from pipeline.training.state import TrainState
from pipeline.training.steps import Step
from tests.distributed.poisoned import Injections, hurt
from tests.unit.quadratic import Quadratic


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
    expected = (
        rf"non-finite numbers at step {position} \(meta-batch {position}, groups {group}\), "
        rf"tasks: {first}, {first + 1}\. .*outer\.on_non_finite: skip"
    )
    with pytest.raises(TrainingError, match=expected):
        train(tmp_path, Quadratic({(position, group): poison}))
    saved = load_checkpoint(tmp_path / "checkpoints")
    kept = 0 if saved is None else saved.state["progress"]["step"]
    assert kept == position // 10 * 10
    if saved is not None:
        clean = train(tmp_path / "clean", Quadratic(), num_steps=60, max_rollbacks=0)
        assert clean.progress.step == 60
        assert torch.isfinite(saved.tensors["vector"]).all()


def without(program: Quadratic, left_out: tuple[int, int], num_steps: int = 60) -> torch.Tensor:
    """The same training without one group, written again in float64 and without a loop's state."""
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    moments = zero_moments(vector)
    for step in range(num_steps):
        groups = [g for g in range(4) if (step, g) != left_out]
        scale = sum(program.usual(step, g) for g in groups) / len(groups)
        lr = warmup_cosine(step, peak=1e-3, num_steps=num_steps, warmup=0, final=0.01)
        gradient = vector * scale
        gradient = gradient * min(1.0, 10.0 / float(gradient.norm()))
        vector, moments = adam_step(vector, gradient, moments, step=step + 1, lr=lr, weight_decay=0)
    return vector


def test_a_poisoned_group_is_left_out_and_its_value_leaves_no_trace(tmp_path: Path) -> None:
    """Back to the checkpoint of step 40, then on without that group: for any poison, the same."""
    cell, ends = (43, 1), []
    for place, poison in enumerate((math.nan, math.inf, -math.inf, 1e5, 3e30, -1e9)):
        program = Quadratic({cell: poison}, noise=0.3, spread=0.5)
        state = train(tmp_path / str(place), program, on_non_finite="skip")
        assert state.progress.skipped == [[43, 1]]
        assert state.progress.ledger == [[0, 60]]
        assert (state.progress.step, state.progress.position) == (60, 60)
        assert state.progress.rollbacks == 1
        ends.append(state)
    for state in ends[1:]:
        assert torch.equal(state.vector, ends[0].vector)
        assert state.progress == ends[0].progress
    expected = without(Quadratic(noise=0.3, spread=0.5), cell)
    torch.testing.assert_close(ends[0].vector.double(), expected, rtol=1e-6, atol=0)
    clean = train(tmp_path / "clean", Quadratic(noise=0.3, spread=0.5))
    assert not torch.allclose(ends[0].vector, clean.vector, rtol=1e-6), "the group does matter"


@pytest.mark.parametrize("poison", [math.nan, 1e5])
def test_a_meta_batch_of_which_nothing_is_left_is_passed_over(
    tmp_path: Path, poison: float
) -> None:
    """The meta-batches are all alike, so that a run which never held that one has the same bits."""
    program = Quadratic({(43, group): poison for group in range(4)})
    state = train(tmp_path / "a", program, on_non_finite="skip")
    assert state.progress.skipped == [[43, group] for group in range(4)]
    assert state.progress.ledger == [[0, 43], [44, 61]]
    assert (state.progress.step, state.progress.position) == (60, 61)
    assert state.progress.rollbacks == 1
    assert torch.equal(state.vector, train(tmp_path / "b", Quadratic()).vector)


def a_step(**changes: Any) -> Step:
    values: dict[str, Any] = {
        "gradient": torch.zeros(2),
        "norm": 1.0,
        "means": {},
        "losses": [[1.0, 2.0]] * 4,
        "norms": [1.0] * 4,
        "seconds": [0.0] * 4,
        "waited": [0.0] * 4,
        "stop": False,
    }
    return Step(**{**values, **changes})


def test_the_groups_with_numbers_that_are_not_finite_are_named() -> None:
    assert a_step().bad_groups() == []
    assert a_step(norms=[1.0, math.nan, 1.0, math.inf]).bad_groups() == [1, 3]
    losses = [[1.0, 1.0], [1.0, 1.0], [1.0, math.inf], [1.0, 1.0]]
    assert a_step(losses=losses).bad_groups() == [2]
    assert a_step(losses=losses, norm=math.nan).bad_groups() == [2]
    assert a_step(norm=math.inf).bad_groups() == [0, 1, 2, 3], "only the sum is wrong: who knows"


def test_a_sum_that_overflows_though_no_group_does_passes_the_meta_batch_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, exact_sum = 0, steps.exact_sum

    def overflowing(*arguments: Any) -> torch.Tensor:
        nonlocal sums
        sums += 1
        return exact_sum(*arguments) * (math.inf if sums == 44 else 1.0)

    monkeypatch.setattr(steps, "exact_sum", overflowing)
    state = train(tmp_path / "a", Quadratic(), on_non_finite="skip")
    assert state.progress.skipped == [[43, group] for group in range(4)]
    assert state.progress.ledger == [[0, 43], [44, 61]]


def test_without_the_guard_the_poison_goes_into_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail; and a checkpoint still refuses what is no number, as JSON does."""
    seen: dict[int, torch.Tensor] = {}

    def look(learner: Learner, step: int) -> tuple[float, Learner]:
        seen[step] = learner.params["w"]
        return 0.0, learner

    program = Quadratic({(43, 1): math.nan})
    monkeypatch.setattr(loop, "_incident", lambda *arguments: None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        train(tmp_path, program, look, on_non_finite="skip")
    assert torch.isfinite(seen[40]).all() and torch.isnan(seen[50]).all()


def test_with_the_spike_guard_off_the_spike_goes_into_the_weights(tmp_path: Path) -> None:
    program = Quadratic({(43, 1): 1e5})
    guarded = train(tmp_path / "a", program)
    open_ = train(tmp_path / "b", program, spike_factor=1e30)
    assert not torch.equal(guarded.vector, open_.vector)
    assert open_.progress.rollbacks == 0


@pytest.mark.parametrize("poison", [math.nan, 1e5])
def test_incidents_in_a_row_are_survived_up_to_the_limit(tmp_path: Path, poison: float) -> None:
    """Two of them in one meta-batch, and one in each of two later ones: three times back."""
    cells = {(42, 0): poison, (42, 3): poison, (47, 2): poison, (52, 1): poison}
    program = Quadratic(cells, noise=0.3)
    state = train(tmp_path / "a", program, on_non_finite="skip", max_rollbacks=3)
    assert state.progress.skipped == [list(cell) for cell in cells]
    assert (state.progress.rollbacks, state.progress.step) == (3, 60)
    with pytest.raises(TrainingError, match=r"meta-batch 52, groups 1\).*, after 2 rollbacks"):
        train(tmp_path / "b", program, on_non_finite="skip", max_rollbacks=2)
    saved = load_checkpoint(tmp_path / "b" / "checkpoints")
    assert saved is not None
    assert saved.state["progress"]["skipped"] == [[42, 0], [42, 3], [47, 2]]


def test_a_spike_stops_the_run_where_the_configuration_says_so(tmp_path: Path) -> None:
    expected = r"a spike at step 43 \(meta-batch 43, groups 1\).*outer\.on_spike: skip"
    with pytest.raises(TrainingError, match=expected):
        train(tmp_path, Quadratic({(43, 1): 1e5}), on_spike="stop")


def test_a_run_that_dies_after_a_rollback_goes_the_same_way_again(tmp_path: Path) -> None:
    """What was left out since the last checkpoint is not on disk: it is found again."""
    program = Quadratic({(43, 1): math.nan, (47, 0): 1e5}, noise=0.3, spread=0.5)
    straight = train(tmp_path / "a", program, on_non_finite="skip")
    died: list[int] = []

    class DiedError(Exception):
        """Somebody pulled the plug."""

    class Dying(Quadratic):
        def gradient(self, params: Params, batch: Key) -> GroupGradient:
            if batch == (48, 2):
                died.append(batch[0])
                raise DiedError
            return super().gradient(params, batch)

    with pytest.raises(DiedError):
        train(tmp_path / "b", Dying(program.scales, 0.3, 0.5), on_non_finite="skip")
    assert died == [48]
    resumed = train(tmp_path / "b", program, on_non_finite="skip")
    assert torch.equal(resumed.vector, straight.vector)
    assert resumed.progress == straight.progress
    assert straight.progress.skipped == [[43, 1], [47, 0]]


def test_every_injection_is_caught_before_an_update(tmp_path: Path) -> None:
    """NaN, inf or a hundredfold loss in a random group; tests/chaos has more, and real workers."""
    rows = hurt(Injections(folder=tmp_path, count=12), SINGLE)
    assert {row["kind"] for row in rows} == {"nan", "inf", "hundredfold"}
    assert all(row["skipped"] == [row["cell"]] and not row["poisoned_updates"] for row in rows)


def test_injections_that_no_guard_catches_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(loop, "_incident", lambda *arguments: None)
    rows = hurt(Injections(folder=tmp_path, count=3, kinds=["hundredfold"]), SINGLE)
    assert all(row["poisoned_updates"] and row["skipped"] == [] for row in rows)


def test_a_long_clean_run_raises_no_false_alarm(tmp_path: Path) -> None:
    """Gradient norms that vary by a factor of ten either way are no spikes; by 1,000, they are."""
    long = {"num_steps": 5000, "checkpoint_every": 500, "validate_every": 500, "patience": 99}
    rough = {**long, "lr": 1e-6}
    state = train(tmp_path / "a", Quadratic(noise=0.7), **rough)
    assert (state.progress.rollbacks, state.progress.skipped) == (0, [])
    with pytest.raises(TrainingError, match="rollbacks"):
        train(tmp_path / "b", Quadratic(noise=3.0), **rough)


def test_a_gradient_that_is_not_even_clipped_is_no_spike(tmp_path: Path) -> None:
    """Where nearly all is learned, the recent ones are next to nothing, and a sound one is not."""
    program = Quadratic({(43, 1): 1e5})
    state = train(tmp_path / "a", program, on_spike="stop", max_gradient_norm=1e6)
    assert (state.progress.rollbacks, state.progress.step) == (0, 60)
    with pytest.raises(TrainingError, match="a spike at step 43"):
        train(tmp_path / "b", program, on_spike="stop", max_gradient_norm=1e3)


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


def test_a_run_that_goes_on_elsewhere_says_so_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twice on other machines; going on where it was adds nothing."""
    own = fingerprint()["id"]
    ends = {"a": 12, "b": 25, "b again": 35, own: 60}
    for kinds, num_steps in ends.items():
        name = kinds.removesuffix(" again")
        monkeypatch.setattr(loop, "kinds_of_machines", lambda context, name=name: name)
        capfd.readouterr()
        program = Quadratic({(num_steps, 0): float("nan")})
        try:
            state = train(tmp_path, program)
        except TrainingError:
            continue
    assert state.progress.machines == [[0, "a"], [10, "b"], [30, own]]
    assert f"a from step 0, b from step 10, {own} from step 30" in capfd.readouterr().err
    assert kinds_of_machines(SINGLE) == own


def test_a_worker_that_disagrees_is_not_blamed_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is left out, or the run stopped, the workers are compared."""

    def disagree(tensors: Any, step: int, context: Any) -> None:
        if step == 33:
            raise DivergenceError("worker 1 held other parameters")

    monkeypatch.setattr(loop, "check_agreement", disagree)
    with pytest.raises(DivergenceError):
        train(tmp_path, Quadratic({(33, 1): float("nan")}))
