"""The training stream: groups of episodes, positioned by one integer."""

from __future__ import annotations

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
        ways, shots = self.shape(position, group)
        return sample(
            self.table,
            self.spec,
            ways=ways,
            shots=shots,
            seed=self.seed,
            stream=TRAIN_STREAM,
            indices=self.indices(position, group),
        )

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
