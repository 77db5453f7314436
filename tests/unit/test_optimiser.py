from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.adam import adam_step, zero_moments
from pipeline.training.schedules import warmup_cosine
from pipeline.training.state import extend_history, extend_ledger, flatten, unflatten


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_matches_pytorch(weight_decay: float) -> None:
    torch.manual_seed(0)
    vector = torch.randn(20, dtype=torch.float64)
    theirs = vector.clone().requires_grad_()
    optimiser = torch.optim.AdamW([theirs], lr=0.01, weight_decay=weight_decay)
    moments = zero_moments(vector)
    for step in range(1, 30):
        gradient = torch.randn(20, dtype=torch.float64)
        vector, moments = adam_step(
            vector, gradient, moments, step=step, lr=0.01, weight_decay=weight_decay
        )
        theirs.grad = gradient
        optimiser.step()
        torch.testing.assert_close(vector, theirs.detach(), rtol=1e-12, atol=1e-12)


def rate(step: int) -> float:
    return warmup_cosine(step, peak=0.4, num_steps=110, warmup=10, final=0.1)


def test_the_schedule_at_the_points_that_define_it() -> None:
    assert rate(0) == pytest.approx(0.04)
    assert rate(9) == pytest.approx(0.4)
    assert rate(10) == pytest.approx(0.4)
    assert rate(60) == pytest.approx(0.4 * (0.1 + 0.9 * 0.5))
    assert rate(110) == pytest.approx(0.04)
    assert rate(35) == pytest.approx(0.4 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))


@given(st.integers(10, 109))
def test_the_schedule_falls_after_its_warmup(step: int) -> None:
    assert rate(step + 1) < rate(step)


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5))
def test_flattening_is_undone(shapes: list[list[int]]) -> None:
    params = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    back = unflatten(flatten(params), params)
    assert set(back) == set(params)
    assert all(torch.equal(back[n], params[n]) for n in params)


@given(st.integers(1, 300), st.integers(1, 9), st.sets(st.integers(1, 300)))
def test_the_history_keeps_the_strides_the_validated_and_the_last(
    steps: int, stride: int, validated: set[int]
) -> None:
    history: list[dict[str, int]] = []
    for step in range(1, steps + 1):
        entry = {"step": step, **({"val_accuracy": 1} if step in validated else {})}
        history = extend_history(history, entry, stride=stride)
    kept = [e["step"] for e in history]
    due = {s for s in range(1, steps + 1) if s % stride == 0 or s in validated or s == steps}
    assert kept == sorted(due)


@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_the_ledger_keeps_every_position_in_order(positions: list[int]) -> None:
    ledger: list[list[int]] = []
    for position in positions:
        ledger = extend_ledger(ledger, position)
    assert [p for first, last in ledger for p in range(first, last)] == positions
    assert all(a[1] < b[0] for a, b in zip(ledger, ledger[1:], strict=False))
