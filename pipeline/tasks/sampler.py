"""Episodes as store rows: vectorised over episodes, each a pure function of (seed, stream, index).

E episodes, N ways, S support rows, Q query rows, C classes, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import TaskError
from pipeline.core.seeding import UInts, random_words
from pipeline.store.reader import Store
from pipeline.tasks.spec import EpisodeSpec, bounds

Ints = npt.NDArray[np.int64]

TRAIN_STREAM, VAL_STREAM, TEST_STREAM, SHAPE_STREAM = 1, 2, 3, 4


class Episodes(NamedTuple):
    """Store rows and labels of episodes that share (N, S, Q)."""

    support_rows: Ints
    """[E, S]"""
    support_labels: Ints
    """[E, S] in [0, N)"""
    query_rows: Ints
    """[E, Q]"""
    query_labels: Ints
    """[E, Q] in [0, N)"""
    classes: Ints
    """[E, N]: the store's class id behind each label"""


@dataclass(frozen=True)
class ClassTable:
    """The classes of one split that hold enough examples, as arrays; groups are contiguous."""

    ids: Ints
    """[C]: the store's class ids, ascending"""
    offsets: Ints
    """[C]: first store row of each class"""
    counts: Ints
    """[C]: rows of each class"""
    group_starts: Ints
    """[G]: index of each group's first class in this table"""
    group_sizes: Ints
    """[G]"""
    name: str
    """For messages: domain and split."""


def class_table(store: Store, split: str, *, min_examples: int) -> ClassTable:
    """The classes of a split that have at least `min_examples` examples."""
    kept = [(i, store.classes[i]) for i in store.class_ids(split)]
    kept = [(i, c) for i, c in kept if c.count >= min_examples]
    groups = np.array([c.group for _, c in kept])
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if kept else np.array([], int)
    return ClassTable(
        ids=np.array([i for i, _ in kept], np.int64),
        offsets=np.array([c.offset for _, c in kept], np.int64),
        counts=np.array([c.count for _, c in kept], np.int64),
        group_starts=starts.astype(np.int64),
        group_sizes=np.diff(np.r_[starts, len(kept)]).astype(np.int64),
        name=f"domain {store.domain!r}, split {split!r}",
    )


def examples_needed(spec: EpisodeSpec) -> int:
    """Examples that a class must have to appear in the largest episode of a spec."""
    most_shots = bounds(spec.shots)[1]
    return (2 * most_shots - 1 if spec.imbalanced else most_shots) + spec.queries


def draw_distinct(words: UInts, population: npt.NDArray[np.int64] | int) -> Ints:
    """Draw without replacement from range(population), vectorised over everything but the draws.

    Draw j picks a rank among the values not yet taken; walking the taken values in ascending order
    turns the rank into a value. Words are scaled by multiplication, so a value's probability is
    off by less than population / 2**32.

    Args:
        words: random 32-bit words [..., K].
        population: size of the population, at least K; a number or an array [...].

    Returns:
        Distinct values [..., K], every ordered selection equally likely.
    """
    drawn: list[Ints] = []
    taken: list[Ints] = []  # the same values, ascending
    for j in range(words.shape[-1]):
        left = np.asarray(population, dtype=np.uint64) - np.uint64(j)
        value = ((words[..., j] * left) >> np.uint64(32)).astype(np.int64)
        for smaller in taken:
            value = value + (value >= smaller)
        drawn.append(value)
        carry = value
        for i, other in enumerate(taken):
            taken[i], carry = np.minimum(other, carry), np.maximum(other, carry)
        taken.append(carry)
    return np.stack(drawn, axis=-1)


def episode_shape(spec: EpisodeSpec, *, seed: int, group: int) -> tuple[int, int]:
    """(ways, shots) of all episodes in one group of the stream: fixed, or drawn from the ranges."""
    (low_n, high_n), (low_k, high_k) = bounds(spec.ways), bounds(spec.shots)
    if (low_n, low_k) == (high_n, high_k):
        return low_n, low_k
    words = random_words(seed, SHAPE_STREAM, np.array(group), 2)
    ways = low_n + (int(words[0]) * (high_n - low_n + 1) >> 32)
    shots = low_k + (int(words[1]) * (high_k - low_k + 1) >> 32)
    return ways, shots


def sample(
    table: ClassTable,
    spec: EpisodeSpec,
    *,
    ways: int,
    shots: int,
    seed: int,
    stream: int,
    indices: npt.NDArray[np.integer],
) -> Episodes:
    """Draw the episodes at some indices of a stream.

    Args:
        indices: positions [E]; an episode never depends on which others are drawn with it.

    Raises:
        TaskError: the table has too few classes, or classes too small, for such an episode.
    """
    check_possible(table, spec, ways=ways, shots=shots)
    most = 2 * shots - 1 if spec.imbalanced else shots
    per_class = most + spec.queries
    num_pairs = ways // 2 if spec.imbalanced else 0
    words = random_words(seed, stream, indices, 1 + ways * (1 + per_class) + num_pairs)
    first, class_words, row_words, pair_words = np.split(
        words, np.cumsum([1, ways, ways * per_class]), axis=-1
    )
    chosen = _choose_classes(table, spec, ways, first[..., 0], class_words)
    picks = draw_distinct(row_words.reshape(-1, ways, per_class), table.counts[chosen])
    rows = table.offsets[chosen][..., None] + picks
    support_mask = np.arange(most) < _shots_per_class(ways, shots, pair_words)[..., None]
    labels = np.broadcast_to(np.arange(ways)[:, None], (len(rows), ways, per_class))
    return Episodes(
        support_rows=rows[..., :most][support_mask].reshape(len(rows), ways * shots),
        support_labels=labels[..., :most][support_mask].reshape(len(rows), ways * shots),
        query_rows=rows[..., most:].reshape(len(rows), -1),
        query_labels=labels[..., most:].reshape(len(rows), -1),
        classes=table.ids[chosen],
    )


def check_possible(table: ClassTable, spec: EpisodeSpec, *, ways: int, shots: int) -> None:
    """Refuse an episode that the table cannot fill.

    Raises:
        TaskError: says what is missing and what to change.
    """
    need = (2 * shots - 1 if spec.imbalanced else shots) + spec.queries
    if len(table.counts) and table.counts.min() < need:
        raise TaskError(
            f"{table.name}: class {table.ids[table.counts.argmin()]} has {table.counts.min()} "
            f"examples, an episode needs {need} (shots + queries). Lower queries or shots, or "
            "raise preprocess.min_examples_per_class."
        )
    sizes = table.group_sizes if spec.within_group else np.array([len(table.ids)])
    if not len(sizes) or sizes.max() < ways:
        where = "the largest group" if spec.within_group else "the split"
        raise TaskError(
            f"{table.name}: a {ways}-way episode with {need} examples a class needs {ways} such "
            f"classes, {where} has {sizes.max() if len(sizes) else 0}. Lower ways, shots or "
            "queries, or give this split more classes."
        )


def _choose_classes(
    table: ClassTable, spec: EpisodeSpec, ways: int, first: UInts, words: UInts
) -> Ints:
    """Table indices of each episode's classes, [E, N]."""
    if not spec.within_group:
        return draw_distinct(words, len(table.ids))
    usable = np.flatnonzero(table.group_sizes >= ways)
    ends = np.cumsum(table.group_sizes[usable])  # a group is as likely as it has classes
    ticket = ((first * np.uint64(ends[-1])) >> np.uint64(32)).astype(np.int64)
    group = usable[np.searchsorted(ends, ticket, side="right")]
    return table.group_starts[group][:, None] + draw_distinct(words, table.group_sizes[group])


def _shots_per_class(ways: int, shots: int, pair_words: UInts) -> Ints:
    """Support size of each class, [E, N]: what one class of a pair gains, the other loses."""
    counts = np.full((len(pair_words), ways), shots, dtype=np.int64)
    spread = 2 * shots - 1
    gain = ((pair_words * np.uint64(spread)) >> np.uint64(32)).astype(np.int64) - (shots - 1)
    num_pairs = pair_words.shape[-1]
    counts[:, 0 : 2 * num_pairs : 2] += gain
    counts[:, 1 : 2 * num_pairs : 2] -= gain
    return counts
