"""How often a run may be started again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import TrainingError
from pipeline.launch.attempts import Attempts


def refused_at(found: list[int], max_restarts: int) -> int | None:
    """Which start is refused, by their checkpoints; None if none is."""
    attempts = Attempts()
    for place, progress in enumerate(found):
        attempts = attempts.begin(progress)
        try:
            attempts.check(max_restarts, "why")
        except TrainingError:
            return place
    return None


@given(
    found=st.lists(st.sampled_from([0, 20, 40, 60]), max_size=40), max_restarts=st.integers(1, 4)
)
def test_only_starts_in_a_row_from_one_checkpoint_count(
    found: list[int], max_restarts: int
) -> None:
    runs = [list(group) for _, group in itertools.groupby(found)]
    expected, before = None, 0
    for run in runs:
        if len(run) > max_restarts + 1:
            expected = before + max_restarts + 1
            break
        before += len(run)
    assert refused_at(found, max_restarts) == expected


@given(steps=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_a_run_that_gets_on_is_started_without_end(steps: list[int]) -> None:
    found = list(itertools.accumulate(steps))
    assert refused_at(found, 1) is None
    assert refused_at(found, 0) == (1 if len(found) > 1 else None), "0: never again"


@given(
    starts=st.lists(st.tuples(st.sampled_from([0, 20]), st.booleans()), min_size=1, max_size=40),
    max_restarts=st.integers(0, 4),
)
def test_starts_for_which_nothing_had_failed_do_not_count(
    starts: list[tuple[int, bool]], max_restarts: int
) -> None:
    """As if they had not been, but for the checkpoint that they found."""
    attempts = Attempts()
    in_a_row, failed, before = 0, 0, None
    for place, (progress, counts) in enumerate(starts):
        attempts = attempts.begin(progress, counts=counts)
        counts = counts or place == 0
        in_a_row = 1 if progress != before else in_a_row + counts
        failed, before = failed + counts, progress
        assert (attempts.progress, attempts.count, attempts.total) == (progress, in_a_row, failed)
        if max_restarts == 0 and failed == 1 and in_a_row == 1:
            attempts.check(max_restarts, "why")


def test_the_refusal_names_the_cause_and_how_often_it_was_tried() -> None:
    with pytest.raises(TrainingError, match=r"^it broke\. Run .*\(4 starts from step 40\)\.$"):
        Attempts(40, 5).check(3, "it broke.")
    with pytest.raises(TrainingError, match=r"^it broke\. Run .*from the last checkpoint\.$"):
        Attempts(40, 2).check(0, "it broke.")
