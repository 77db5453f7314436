"""Numbers with honest intervals: accuracy, paired differences, calibration, confusions.

E episodes, Q queries of one episode, T test classes that occur, B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

Z95 = 1.96
"""Half width of a 95 % interval in standard errors, as the field reports it."""

_DRAWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval."""

    mean: float
    half_width: float
    num_values: int

    @property
    def lower(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def upper(self) -> float:
        """Upper end."""
        return self.mean + self.half_width


def mean_interval(values_E: Array) -> Interval:
    """Mean with a 95 % interval, m ± 1.96 s / sqrt(n), s² = Σ (v - m)² / (n - 1).

    It speaks of other episodes of the *same* classes: the protocol of few-shot papers. A single
    value has no spread to judge by, so its interval is infinite.
    """
    values = np.asarray(values_E, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one value")
    if values.size == 1:
        return Interval(float(values[0]), math.inf, 1)
    half_width = Z95 * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(float(values.mean()), half_width, values.size)


def paired_difference(first_E: Array, second_E: Array) -> Interval:
    """`mean_interval` of first - second, value by value on the same episodes.

    What both find hard in an episode cancels, so it is far narrower than two separate intervals.
    """
    first, second = np.asarray(first_E, np.float64), np.asarray(second_E, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"not the same episodes: shapes {first.shape} and {second.shape}")
    return mean_interval(first - second)


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: M bins of equal width over the confidence."""

    error: float
    """Expected calibration error, in [0, 1]."""
    edges: Floats
    """[M + 1]."""
    counts: Ints
    """Queries in each bin [M]."""
    confidence: Floats
    """Mean confidence of each bin [M]; NaN where it is empty."""
    accuracy: Floats
    """Share of right answers in each bin [M]; NaN where it is empty."""


def calibration(confidence: Array, correct: Array, num_bins: int = 15) -> Calibration:
    """Reliability bins and ECE = Σ_m |B_m|/n · |acc(B_m) - conf(B_m)|, B_m = ((m-1)/M, m/M].

    Args:
        confidence: probability of the chosen class, any shape, in [0, 1].
        correct: whether it was right, same shape.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, eq. 3, arXiv:1706.04599;
        15 bins as in its section 5.
    """
    confidence = np.asarray(confidence, np.float64).ravel()
    correct = np.asarray(correct, np.float64).ravel()
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, num_bins) / counts
        accuracy = np.bincount(bins, correct, num_bins) / counts
    gaps = np.nan_to_num(np.abs(accuracy - mean_confidence))
    error = float(counts @ gaps / max(confidence.size, 1))
    return Calibration(error, edges, counts, mean_confidence, accuracy)


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy on the queries whose class is in one group."""

    group: str
    accuracy: Interval
    """`num_values` counts episodes that had such queries."""
    num_queries: int
    num_classes: int


def accuracy_by_group(
    correct: Array, query_class: Array, groups: Sequence[str]
) -> list[GroupAccuracy]:
    """Accuracy of each group of classes, in the order of the group names.

    The queries of one episode share a support set, so the interval takes whole episodes as its
    units. With k_e right of n_e queries in episode e, the ratio r = Σ k_e / Σ n_e has
    variance E/(E-1) Σ (k_e - r n_e)² / (Σ n_e)²; for equal n_e this is `mean_interval`.

    Args:
        correct: [E, Q].
        query_class: global class ids [E, Q].
        groups: the group of every global class id.

    References:
        Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6 (the variance of a ratio).
    """
    correct, query_class = np.asarray(correct), np.asarray(query_class)
    names = sorted({groups[c] for c in np.unique(query_class)})
    row = np.array([names.index(g) if g in set(names) else -1 for g in groups])[query_class]
    return [_one_group(name, correct, query_class, row == i) for i, name in enumerate(names)]


def _one_group(name: str, correct: Array, query_class: Array, member: Array) -> GroupAccuracy:
    asked = member.sum(axis=1)
    right = (member & correct.astype(bool)).sum(axis=1)[asked > 0]
    asked = asked[asked > 0]
    ratio, num = right.sum() / asked.sum(), len(asked)
    half_width = math.inf
    if num > 1:
        spread = ((right - ratio * asked) ** 2).sum() * num / (num - 1)
        half_width = Z95 * math.sqrt(spread) / asked.sum()
    num_classes = len(np.unique(query_class[member]))
    return GroupAccuracy(
        name, Interval(float(ratio), half_width, num), int(asked.sum()), num_classes
    )


@dataclass(frozen=True)
class Confusions:
    """Who was taken for whom. Rows and columns follow `classes`."""

    classes: Ints
    """Global ids of the classes that occur [T], ascending."""
    taken: Ints
    """Queries of the row's class that were answered with the column's class [T, T]."""
    asked: Ints
    """Queries of the row's class in episodes that held the column's class too [T, T]."""
    together: Ints
    """Episodes that held both [T, T]."""


def confusions(query_class: Array, predicted_class: Array) -> Confusions:
    """Count answers and opportunities for every ordered pair of classes.

    Args:
        query_class: true global class ids [E, Q]; every class of an episode has queries.
        predicted_class: the answers [E, Q], each a class of its episode.
    """
    classes, true = np.unique(query_class, return_inverse=True)
    true = true.reshape(np.shape(query_class))
    answer = np.searchsorted(classes, predicted_class)
    E, T = len(true), len(classes)
    taken = np.bincount((true * T + answer).ravel(), minlength=T * T).reshape(T, T)
    episode = np.arange(E)[:, None]
    queries_ET = np.bincount((episode * T + true).ravel(), minlength=E * T).reshape(E, T)
    queries_ET = queries_ET.astype(np.float64)  # BLAS multiplies floats only; exact below 2**53
    present_ET = np.minimum(queries_ET, 1.0)
    asked = np.rint(queries_ET.T @ present_ET).astype(np.int64)
    together = np.rint(present_ET.T @ present_ET).astype(np.int64)
    return Confusions(classes, taken, asked, together)


@dataclass(frozen=True)
class ConfusedPair:
    """Queries of one class that were answered with another."""

    true_class: int
    answered_class: int
    taken: int
    asked: int
    together: int

    @property
    def rate(self) -> float:
        """Share of the true class's queries, in episodes that held both, that went astray."""
        return self.taken / self.asked


def worst_pairs(table: Confusions, num_pairs: int) -> list[ConfusedPair]:
    """The ordered pairs that are confused most often, worst first.

    Ranked by the lower end of Wilson's 95 % interval of the rate, so that one unlucky episode does
    not outrank a pair that fails every time. Its n is the number of *episodes* that held both:
    the queries of one episode hang on one support set and are far from independent.

    References:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    wrong = table.taken * ~np.eye(len(table.classes), dtype=bool)
    rows, columns = np.nonzero(wrong)
    n = table.together[rows, columns].astype(np.float64)
    rate = table.taken[rows, columns] / table.asked[rows, columns]
    centre = rate + Z95**2 / (2 * n)
    spread = Z95 * np.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    score = (centre - spread) / (1 + Z95**2 / n)
    order = np.lexsort((columns, rows, -score))[:num_pairs]
    return [_pair(table, int(rows[i]), int(columns[i])) for i in order]


def _pair(table: Confusions, row: int, column: int) -> ConfusedPair:
    ids = int(table.classes[row]), int(table.classes[column])
    counts = (table.taken, table.asked, table.together)
    return ConfusedPair(*ids, *(int(count[row, column]) for count in counts))


@dataclass(frozen=True)
class BootstrapInterval:
    """A difference of accuracies with a percentile interval over resampled classes."""

    difference: float
    lower: float
    upper: float
    num_draws: int
    num_classes: int


def class_bootstrap(
    query_class: Array,
    first_answers: Array,
    second_answers: Array,
    *,
    num_draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    among: Array | None = None,
) -> BootstrapInterval:
    """Accuracy of first - second on the same queries, as it would vary over other test *classes*.

    Thousands of episodes are drawn from perhaps a hundred classes, so episodes are not
    independent: a model that happens to like a few of these classes wins in every episode that
    holds them. The classes are the independent draws, so they are what is resampled.

    A wrong answer concerns two classes: the true one, a, and the one that was answered, b. With
    n_ab the errors a -> b and o_ab the queries of a in episodes that held b (a ≠ b), the
    accuracy of N-way episodes is a mean over ordered pairs of classes,

        accuracy = 1 - (N - 1) Σ n_ab / Σ o_ab,

    and one draw takes T classes with replacement and gives every pair the weight m_a m_b of the
    multiplicities of both its members:

        difference* = (N - 1) Σ m_a m_b (n_ab[second] - n_ab[first]) / Σ m_a m_b o_ab.

    Weighting a query by its true class alone would miss the classes that *attract* wrong answers.
    Weighting an episode by all its N classes is no better: 20 of 100 resampled classes are all
    there once in ten thousand draws. Which other N - 2 classes were in the episode is left out.
    Episodes are not resampled on top: the luck of their support and query draws lies inside the
    pairs, where both members already count it. The interval is therefore a little too wide where
    that luck dominates; it never takes the luck of the classes for skill. With few classes a
    bootstrap is too narrow instead, so the draws are spread as T/(T-1) and Student's t ask.

    Args:
        query_class: true global class ids [E, Q]; every episode has the same number of ways.
        first_answers: predicted class ids of the first learner [E, Q].
        second_answers: those of the second [E, Q].
        confidence: of the two-sided interval: at 0.95, `lower` is the 2.5 % point of the draws.
        among: global ids of two or more classes whose queries alone count, a group of them: the
            sums then run over pairs with the true class a in it, and T is their number.

    References:
        Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007, arXiv:0712.1111.
        Davezies, D'Haultfœuille and Guyonvarch, Empirical process results for exchangeable
        arrays, Annals of Statistics 2021, arXiv:1906.11293 (pairs that share a member).
        Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, Journal of Human
        Resources 2015, section VI (few clusters).
    """
    first = confusions(query_class, first_answers)
    second = confusions(query_class, second_answers)
    counted = np.isin(first.classes, first.classes if among is None else among)
    pairs = counted[:, None] & ~np.eye(len(first.classes), dtype=bool)
    T = int(counted.sum())
    gained = ((second.taken - first.taken) * pairs).astype(np.float64)
    asked = (first.asked * pairs).astype(np.float64)
    scale = asked.sum() / np.isin(query_class, first.classes[counted]).sum()  # N - 1
    difference = scale * gained.sum() / asked.sum()
    draws = scale * _weighted_ratios(gained, asked, num_draws, seed)
    tail = (1 - confidence) / 2
    quantiles = np.quantile(draws[np.isfinite(draws)], [tail, 1 - tail])
    lower, upper = difference + (quantiles - difference) * _few_clusters(T, tail)
    return BootstrapInterval(float(difference), float(lower), float(upper), num_draws, T)


def _few_clusters(T: int, tail: float) -> float:
    """sqrt(T / (T-1)) times Student's t over the normal quantile, t/z ≈ 1 + (z² + 1) / 4(T-1)."""
    z = NormalDist().inv_cdf(tail)
    return math.sqrt(T / (T - 1)) * (1 + (z * z + 1) / (4 * (T - 1)))


def _weighted_ratios(top_TT: Floats, bottom_TT: Floats, num_draws: int, seed: int) -> Floats:
    """Σ m_a m_b top_ab / Σ m_a m_b bottom_ab of B multinomial draws m; NaN where it is 0/0."""
    T = len(top_TT)
    stacked = np.concatenate([top_TT, bottom_TT], axis=1)
    rng = np.random.default_rng(seed)
    ratios = np.empty(num_draws)
    for start in range(0, num_draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, num_draws - start)
        m = rng.multinomial(T, np.full(T, 1 / T), size=count).astype(np.float64)
        product = (m @ stacked).reshape(count, 2, T)
        sums = np.einsum("bkt,bt->kb", product, m)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios[start : start + count] = sums[0] / sums[1]
    return ratios
