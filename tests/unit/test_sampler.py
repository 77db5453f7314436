"""Episodes are pure in (seed, index), valid, and equal to a plain second implementation."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.errors import TaskError
from pipeline.store.reader import Store
from pipeline.tasks.sampler import (
    ClassTable,
    class_table,
    draw_distinct,
    episode_shape,
    examples_needed,
    sample,
)
from pipeline.tasks.spec import EpisodeSpec, bounds
from pipeline.tasks.stream import train_stream


def drawn_one_by_one(words: list[int], population: int) -> list[int]:
    """The same draws, by striking values off a list."""
    left = list(range(population))
    return [left.pop(word * len(left) >> 32) for word in words]


@given(st.data(), st.integers(1, 8), st.integers(0, 20))
def test_draws_equal_striking_off_a_list(data: st.DataObject, draws: int, spare: int) -> None:
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=draws, max_size=draws))
    got = draw_distinct(np.array(words, np.uint64), draws + spare)
    assert got.tolist() == drawn_one_by_one(words, draws + spare)


def test_every_ordered_selection_is_equally_likely() -> None:
    """One word per equal slice of the range: each of 4 * 3 selections is met the same number of times."""
    grid = (np.arange(24) * 2**32 // 24 + 7).astype(np.uint64)
    words = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    counts = Counter(map(tuple, draw_distinct(words, 4).tolist()))
    assert counts == {pair: 48 for pair in permutations(range(4), 2)}


specs = st.builds(
    EpisodeSpec,
    ways=st.integers(2, 6),
    shots=st.integers(1, 4),
    queries=st.integers(1, 5),
    within_group=st.booleans(),
    imbalanced=st.booleans(),
)


@settings(deadline=None)
@given(spec=specs, seed=st.integers(0, 2**63), first=st.integers(0, 2**33))
def test_episodes_are_whole_and_disjoint(
    blob_store: Store, spec: EpisodeSpec, seed: int, first: int
) -> None:
    table = class_table(blob_store, "train", min_examples=examples_needed(spec))
    ways, shots = spec.ways, spec.shots
    assert isinstance(ways, int)
    assert isinstance(shots, int)
    episodes = sample(
        table,
        spec,
        ways=ways,
        shots=shots,
        seed=seed,
        stream=1,
        indices=np.arange(first, first + 4),
    )
    labels = blob_store.labels()
    for support, support_y, query, query_y, classes in zip(*episodes, strict=True):
        rows = [*support.tolist(), *query.tolist()]
        assert len(set(rows)) == len(rows) == ways * (shots + spec.queries)
        assert len(set(classes.tolist())) == ways
        assert labels[support].tolist() == classes[support_y].tolist()
        assert labels[query].tolist() == classes[query_y].tolist()
        assert np.bincount(query_y).tolist() == [spec.queries] * ways
        per_class = np.bincount(support_y, minlength=ways)
        assert per_class.sum() == ways * shots
        assert per_class.min() >= 1
        if not spec.imbalanced:
            assert per_class.tolist() == [shots] * ways
        groups = {blob_store.classes[c].group for c in classes}
        assert len(groups) == 1 or not spec.within_group
        assert {blob_store.classes[c].split for c in classes} == {"train"}


def test_imbalance_and_groups_do_vary(blob_store: Store) -> None:
    spec = EpisodeSpec(ways=4, shots=3, queries=2, within_group=True, imbalanced=True)
    table = class_table(blob_store, "train", min_examples=examples_needed(spec))
    episodes = sample(table, spec, ways=4, shots=3, seed=0, stream=1, indices=np.arange(200))
    sizes = {n for y in episodes.support_labels for n in np.bincount(y).tolist()}
    assert sizes == {1, 2, 3, 4, 5}
    assert {blob_store.classes[c].group for c in episodes.classes.ravel()} == {"train-a", "train-b"}


@settings(deadline=None)
@given(
    position=st.integers(0, 1000),
    group=st.integers(0, 7),
    seed=st.integers(0, 2**32),
)
def test_an_episode_depends_on_seed_and_index_alone(
    blob_store: Store, position: int, group: int, seed: int
) -> None:
    """Drawn in its group, or in any other company at its index, an episode is the same."""
    spec = EpisodeSpec(ways=3, shots=2, queries=2)
    stream = train_stream(blob_store, spec, seed=seed, num_groups=8, tasks_per_group=3)
    grouped = stream.group(position, group)
    index = stream.indices(position, group)[1]
    company = np.array([index + 5, index])
    alone = sample(stream.table, spec, ways=3, shots=2, seed=seed, stream=1, indices=company)
    for ours, theirs in zip(grouped, alone, strict=True):
        assert ours[1].tolist() == theirs[1].tolist()


@given(
    steps=st.integers(1, 5),
    groups=st.integers(1, 9),
    tasks=st.integers(1, 4),
    start=st.integers(0, 99),
)
def test_every_index_is_in_one_group_once(
    blob_store: Store, steps: int, groups: int, tasks: int, start: int
) -> None:
    spec = EpisodeSpec(ways=2, shots=1, queries=1)
    stream = train_stream(blob_store, spec, seed=0, num_groups=groups, tasks_per_group=tasks)
    seen = [
        int(i)
        for p in range(start, start + steps)
        for g in range(groups)
        for i in stream.indices(p, g)
    ]
    assert seen == list(range(start * groups * tasks, (start + steps) * groups * tasks))


@given(seed=st.integers(0, 2**32), group=st.integers(0, 2**32 - 1))
def test_ranged_shapes_stay_in_range(seed: int, group: int) -> None:
    spec = EpisodeSpec(ways=[3, 7], shots=[1, 4])
    ways, shots = episode_shape(spec, seed=seed, group=group)
    assert 3 <= ways <= 7
    assert 1 <= shots <= 4


def test_ranged_shapes_are_all_met() -> None:
    spec = EpisodeSpec(ways=[3, 5], shots=[1, 2])
    shapes = {episode_shape(spec, seed=0, group=g) for g in range(200)}
    assert shapes == {(n, k) for n in (3, 4, 5) for k in (1, 2)}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (EpisodeSpec(ways=25), "a 25-way episode .* needs 25 such classes, the split has 24"),
        (
            EpisodeSpec(ways=13, within_group=True),
            "needs 13 such classes, the largest group has 12",
        ),
        (EpisodeSpec(ways=2, queries=30), "needs 2 such classes, the split has 0"),
    ],
)
def test_an_impossible_episode_is_refused(
    blob_store: Store, spec: EpisodeSpec, expected: str
) -> None:
    table = class_table(blob_store, "train", min_examples=examples_needed(spec))
    with pytest.raises(TaskError, match=expected):
        sample(
            table,
            spec,
            ways=bounds(spec.ways)[0],
            shots=1,
            seed=0,
            stream=1,
            indices=np.arange(1),
        )


def test_a_class_too_small_is_refused() -> None:
    one = np.array([0])
    table = ClassTable(one, one, np.array([5]), one, np.array([1]), "domain 'x', split 'train'")
    with pytest.raises(TaskError, match="class 0 has 5 examples, an episode needs 16"):
        sample(table, EpisodeSpec(), ways=5, shots=1, seed=0, stream=1, indices=np.arange(1))


@pytest.mark.parametrize("bad", [{"ways": [5, 3]}, {"ways": 1}, {"shots": 0}, {"wys": 5}])
def test_a_wrong_spec_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EpisodeSpec.model_validate(bad)
