"""The training stream: groups of episodes, positioned by one integer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.store.reader import Store
from pipeline.tasks.sampler import (
    TRAIN_STREAM,
    ClassTable,
    Episodes,
    check_possible,
    class_table,
    episode_shape,
    examples_needed,
    sample,
)
from pipeline.tasks.spec import EpisodeSpec, bounds


@dataclass(frozen=True)
class TrainStream:
    """Meta-batches of `num_groups` groups; the episodes of one group share their shape."""

    table: ClassTable
    spec: EpisodeSpec
    seed: int
    num_groups: int
    tasks_per_group: int

    def group(self, position: int, group: int) -> Episodes:
        """The episodes of one group of the meta-batch at a position."""
        return self.groups([(position, group)])[0]

    def groups(self, keys: Sequence[tuple[int, int]]) -> list[Episodes]:
        """The episodes of several (position, group)s.

        Those that share their shape are drawn by one call, which takes hardly longer than the call
        for one of them; what a group holds does not depend on that.
        """
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, key in enumerate(keys):
            by_shape.setdefault(self.shape(*key), []).append(place)
        found: dict[int, Episodes] = {}
        for (ways, shots), places in by_shape.items():
            episodes = sample(
                self.table,
                self.spec,
                ways=ways,
                shots=shots,
                seed=self.seed,
                stream=TRAIN_STREAM,
                indices=np.concatenate([self.indices(*keys[place]) for place in places]),
            )
            for i, place in enumerate(places):
                part = slice(i * self.tasks_per_group, (i + 1) * self.tasks_per_group)
                found[place] = Episodes(*(values[part] for values in episodes))
        return [found[place] for place in range(len(keys))]

    def indices(self, position: int, group: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Stream indices of a group's episodes; every index belongs to exactly one group."""
        first = (position * self.num_groups + group) * self.tasks_per_group
        return np.arange(first, first + self.tasks_per_group)

    def shape(self, position: int, group: int) -> tuple[int, int]:
        """(ways, shots) of a group's episodes."""
        return episode_shape(self.spec, seed=self.seed, group=position * self.num_groups + group)


def train_stream(
    store: Store, spec: EpisodeSpec, *, seed: int, num_groups: int, tasks_per_group: int
) -> TrainStream:
    """The stream over a store's training classes.

    Raises:
        TaskError: the largest episode of the spec cannot be drawn.
    """
    table = class_table(store, "train", min_examples=examples_needed(spec))
    check_possible(table, spec, ways=bounds(spec.ways)[1], shots=bounds(spec.shots)[1])
    return TrainStream(table, spec, seed, num_groups, tasks_per_group)
