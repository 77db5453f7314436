from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import (
    Confusions,
    accuracy_by_group,
    calibration,
    class_bootstrap,
    confusions,
    mean_interval,
    paired_difference,
    worst_pairs,
)

Array = npt.NDArray[Any]
seeds = st.integers(0, 2**32 - 1)


def random_answers(
    seed: int, *, E: int = 12, N: int = 3, Q: int = 4, T: int = 7
) -> tuple[Array, Array, Array]:
    """Random episodes with gaps in the class ids, and two learners that answer at random."""
    rng = np.random.default_rng(seed)
    classes = 10 + 3 * np.argsort(rng.random((E, T)), axis=1)[:, :N]
    first, second = (
        np.take_along_axis(classes, rng.integers(0, N, (E, N * Q)), axis=1) for _ in range(2)
    )
    return np.repeat(classes, Q, axis=1), first, second


@given(k=st.integers(1, 40), low=st.floats(-5, 5), gap=st.floats(0.01, 9))
def test_the_interval_of_two_alternating_values_is_in_closed_form(
    k: int, low: float, gap: float
) -> None:
    """k times low and k times low + gap: s^2 = gap^2 / 4 * 2k / (2k - 1)."""
    found = mean_interval(np.array([low, low + gap] * k))
    s = gap / 2 * math.sqrt(2 * k / (2 * k - 1))
    assert found.mean == pytest.approx(low + gap / 2, rel=1e-9, abs=1e-9)
    assert found.half_width == pytest.approx(1.96 * s / math.sqrt(2 * k), rel=1e-9)
    assert found.upper - found.lower == pytest.approx(2 * found.half_width)


def test_one_value_has_no_spread_to_judge_by_and_none_has_no_mean() -> None:
    assert mean_interval(np.array([0.5])).lower == -math.inf
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(np.array([]))


@given(seed=seeds, shift=st.floats(-1, 1))
def test_what_two_learners_share_cancels_in_the_paired_difference(seed: int, shift: float) -> None:
    values = np.random.default_rng(seed).normal(size=50)
    found = paired_difference(values + shift, values)
    assert found.mean == pytest.approx(shift, abs=1e-12)
    assert found.half_width < 1e-12 < mean_interval(values).half_width


def test_a_difference_of_other_episodes_is_refused() -> None:
    with pytest.raises(ValueError, match="not the same episodes"):
        paired_difference(np.zeros(3), np.zeros(4))


@given(seed=seeds, num_bins=st.integers(1, 20), n=st.integers(1, 60))
def test_the_calibration_error_is_that_of_a_slow_loop(seed: int, num_bins: int, n: int) -> None:
    """Guo et al. 2017, eq. 3, with bins ((m-1)/M, m/M]; half of the values lie on an edge."""
    rng = np.random.default_rng(seed)
    confidence = np.where(
        rng.random(n) < 0.5,
        np.linspace(0, 1, num_bins + 1)[rng.integers(0, num_bins + 1, n)],
        rng.random(n),
    )
    correct = rng.random(n) < confidence
    error = 0.0
    for m in range(1, num_bins + 1):
        edges = np.linspace(0, 1, num_bins + 1)
        inside = [
            i
            for i in range(n)
            if edges[m - 1] < confidence[i] <= edges[m] or (m == 1 and confidence[i] == 0)
        ]
        if inside:
            gap = sum(float(correct[i]) - confidence[i] for i in inside) / len(inside)
            error += len(inside) / n * abs(gap)
    found = calibration(confidence, correct, num_bins)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.counts.sum() == n


@given(right=st.integers(0, 20), n=st.integers(20, 30))
def test_a_learner_that_is_always_sure_is_off_by_its_error_rate(right: int, n: int) -> None:
    correct = np.arange(n) < right
    assert calibration(np.ones(n), correct).error == pytest.approx(1 - right / n)


def test_a_perfectly_calibrated_learner_has_no_calibration_error() -> None:
    confidence = np.repeat([0.25, 0.5, 0.75], 4)
    correct = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    assert calibration(confidence, correct, 4).error == pytest.approx(0, abs=1e-15)


@given(seed=seeds)
def test_groups_of_whole_episodes_have_the_plain_interval(seed: int) -> None:
    """All queries of an episode in one group and equally many: the ratio is the mean."""
    rng = np.random.default_rng(seed)
    group_of_episode = np.array([0, 1, 0, 1, 0, 0, 1])
    query_class = np.repeat(group_of_episode[:, None], 8, axis=1)
    correct = rng.random((7, 8)) < 0.7
    found = accuracy_by_group(correct, query_class, ["b", "a"])
    assert [g.group for g in found] == ["a", "b"]
    for g, label in zip(found, (1, 0), strict=True):
        plain = mean_interval(correct.mean(axis=1)[group_of_episode == label])
        assert g.accuracy.mean == pytest.approx(plain.mean)
        assert g.accuracy.half_width == pytest.approx(plain.half_width)
        assert g.accuracy.num_values == plain.num_values


@given(seed=seeds)
def test_groups_share_out_all_queries(seed: int) -> None:
    query_class, answers, _ = random_answers(seed)
    groups = ["even" if c % 2 == 0 else "odd" for c in range(query_class.max() + 1)]
    found = accuracy_by_group(answers == query_class, query_class, groups)
    right = sum(g.accuracy.mean * g.num_queries for g in found)
    assert right == pytest.approx((answers == query_class).sum())
    assert sum(g.num_queries for g in found) == query_class.size
    assert sum(g.num_classes for g in found) == len(np.unique(query_class))


def count_slowly(query_class: Array, answers: Array) -> tuple[Counter[Any], ...]:
    taken, asked, together = Counter[Any](), Counter[Any](), Counter[Any]()
    for true_row, said_row in zip(query_class.tolist(), answers.tolist(), strict=True):
        for true, said in zip(true_row, said_row, strict=True):
            taken[true, said] += 1
            for other in set(true_row):
                asked[true, other] += 1
        for true in set(true_row):
            for other in set(true_row):
                together[true, other] += 1
    return taken, asked, together


def as_counters(table: Confusions) -> tuple[Counter[Any], ...]:
    return tuple(
        Counter(
            {
                (int(a), int(b)): int(counts[i, j])
                for i, a in enumerate(table.classes)
                for j, b in enumerate(table.classes)
            }
        )
        for counts in (table.taken, table.asked, table.together)
    )


@given(seed=seeds)
def test_confusions_are_those_of_a_slow_loop(seed: int) -> None:
    query_class, answers, _ = random_answers(seed)
    for fast, slow in zip(
        as_counters(confusions(query_class, answers)),
        count_slowly(query_class, answers),
        strict=True,
    ):
        assert fast == slow


def test_a_planted_confusion_is_the_worst_pair_and_one_unlucky_episode_is_not() -> None:
    """Class 1 is taken for 2 in half of 40 episodes; 5 for 6 always, in the one that held both."""
    query_class = np.array([[1, 2, 3, 4]] * 40 + [[5, 6, 1, 3]])
    answers = query_class.copy()
    answers[:20, 0] = 2
    answers[40, 0] = 6
    worst = worst_pairs(confusions(query_class, answers), 10)
    assert [(p.true_class, p.answered_class) for p in worst] == [(1, 2), (5, 6)]
    assert worst[0].rate == 0.5
    assert (worst[0].taken, worst[0].asked, worst[0].together) == (20, 40, 40)
    assert worst[1].rate == 1.0


def test_a_perfect_learner_confuses_nothing() -> None:
    query_class, _, _ = random_answers(0)
    assert worst_pairs(confusions(query_class, query_class), 5) == []


@settings(deadline=None)
@given(seed=seeds)
def test_the_difference_is_the_plain_difference_of_means(seed: int) -> None:
    query_class, first, second = random_answers(seed)
    found = class_bootstrap(query_class, first, second, num_draws=1000)
    plain = (first == query_class).mean() - (second == query_class).mean()
    assert found.difference == pytest.approx(plain, abs=1e-12)
    assert found.num_classes == len(np.unique(query_class))


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_bootstrap_is_that_of_slow_loops_over_resampled_classes(seed: int) -> None:
    """Resampled classes as a list, every pair of its members visited, every count made by hand."""
    query_class, first, second = random_answers(seed)
    N, num_draws = 3, 1000
    classes = np.unique(query_class)
    T = len(classes)
    taken_first, asked, _ = count_slowly(query_class, first)
    taken_second, _, _ = count_slowly(query_class, second)
    rng = np.random.default_rng(5)
    draws = []
    for m in rng.multinomial(T, np.full(T, 1 / T), size=num_draws):
        copies = np.repeat(classes, m).tolist()
        pairs = [(a, b) for a in copies for b in copies if a != b]
        errors = sum(taken_second[p] - taken_first[p] for p in pairs)
        opportunities = sum(asked[p] for p in pairs)
        if opportunities:
            draws.append((N - 1) * errors / opportunities)
    lower, upper = np.quantile(draws, [0.025, 0.975])
    widened = math.sqrt(T / (T - 1)) * (1 + (1.959963985**2 + 1) / (4 * (T - 1)))
    found = class_bootstrap(query_class, first, second, num_draws=num_draws, seed=5)
    centre = found.difference
    assert found.lower == pytest.approx(centre + (lower - centre) * widened, abs=1e-9)
    assert found.upper == pytest.approx(centre + (upper - centre) * widened, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_the_bootstrap_has_the_symmetries_of_its_question(seed: int) -> None:
    """Swapped learners negate it, equal ones give zero, and order does not matter."""
    query_class, first, second = random_answers(seed)
    found = class_bootstrap(query_class, first, second, num_draws=1000)
    swapped = class_bootstrap(query_class, second, first, num_draws=1000)
    assert (swapped.lower, swapped.upper) == pytest.approx((-found.upper, -found.lower))
    same = class_bootstrap(query_class, first, first, num_draws=1000)
    assert (same.lower, same.difference, same.upper) == (0, 0, 0)
    order = np.random.default_rng(seed).permutation(len(query_class))
    moved = (array[order][:, ::-1] for array in (query_class, first, second))
    assert class_bootstrap(*moved, num_draws=1000) == found


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_the_same_episodes_again_are_no_new_evidence(seed: int) -> None:
    """Ten copies of every episode: the episode interval shrinks, the class bootstrap does not."""
    query_class, first, second = random_answers(seed)
    once = class_bootstrap(query_class, first, second, num_draws=1000)
    copied = [np.concatenate([array] * 10) for array in (query_class, first, second)]
    ten = class_bootstrap(*copied, num_draws=1000)
    assert (ten.lower, ten.upper) == pytest.approx((once.lower, once.upper), abs=1e-12)
    right = [array == query_class for array in (first, second)]
    plain = paired_difference(right[0].mean(axis=1), right[1].mean(axis=1))
    much = paired_difference(np.tile(right[0].mean(axis=1), 10), np.tile(right[1].mean(axis=1), 10))
    assert much.half_width < plain.half_width / 3 or plain.half_width == 0


def test_a_higher_confidence_asks_for_a_wider_interval() -> None:
    query_class, first, second = random_answers(1)
    narrow, wide = (
        class_bootstrap(query_class, first, second, num_draws=2000, confidence=c)
        for c in (0.8, 0.99)
    )
    assert wide.lower < narrow.lower < narrow.difference < narrow.upper < wide.upper
