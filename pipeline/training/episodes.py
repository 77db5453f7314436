"""Episodes from the training stream to tasks on the device.

E episodes, N ways, S support and Q query examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.types import Task
from pipeline.engine.learner import Preprocessing
from pipeline.tasks.sampler import Episodes
from pipeline.tasks.stream import TrainStream
from pipeline.training.augment import EPISODE_MOVES, OFF, AugmentConfig, draw_moves, moved
from pipeline.training.feed import Feed, Key
from pipeline.training.pictures import Pictures, to_device

_GROUPS_PER_DRAW = 32  # drawing costs mostly per call; rows are small, so a restart wastes little
_FEWEST_AHEAD = 4


class HostEpisodes(NamedTuple):
    """A group of episodes in host memory."""

    fetched: Tensor
    """[E, S + Q, ...]: pictures or row numbers"""
    support_y: Tensor
    """[E, S]"""
    query_y: Tensor
    """[E, Q]"""
    num_ways: int
    """N"""
    moves: Tensor | None
    """[E, S + Q, 3], of the pictures; None leaves them as they are"""


def episode_feed(
    stream: TrainStream,
    source: Pictures,
    preprocessing: Preprocessing,
    groups: Sequence[int],
    device: torch.device,
    *,
    ahead: int,
    augment: AugmentConfig = OFF,
) -> Feed[HostEpisodes, list[Task]]:
    """The tasks of a worker's groups, position after position."""

    def load(keys: Iterator[Key]) -> Iterator[HostEpisodes]:
        for block in blocks(keys):
            drawn = stream.groups(block)
            moves = draw_moves(
                augment,
                seed=stream.seed,
                stream=EPISODE_MOVES,
                indices=(stream.indices(*key) for key in block),
                sizes=[g.support_rows.shape[1] + g.query_rows.shape[1] for g in drawn],
            )
            for episodes, own in zip(drawn, moves, strict=True):
                yield fetch_episodes(episodes, source, own)

    def land(episodes: HostEpisodes) -> list[Task]:
        return land_tasks(episodes, source, preprocessing, device)

    return Feed(load, land, groups, ahead=ahead)


def fetch_episodes(
    episodes: Episodes, source: Pictures, moves: Tensor | None = None
) -> HostEpisodes:
    """The host half of the way from rows to tasks."""
    rows = np.concatenate([episodes.support_rows, episodes.query_rows], axis=1)
    return HostEpisodes(
        source.fetch(rows),
        torch.from_numpy(np.array(episodes.support_labels)),  # copies: these are broadcast
        torch.from_numpy(np.array(episodes.query_labels)),
        episodes.classes.shape[1],
        moves,
    )


def land_tasks(
    episodes: HostEpisodes, source: Pictures, preprocessing: Preprocessing, device: torch.device
) -> list[Task]:
    """The device half: bring there, augment, normalise, and cut into tasks."""
    fetched, support_y, query_y = (
        to_device(t, device) for t in (episodes.fetched, episodes.support_y, episodes.query_y)
    )
    pictures = moved(source.pictures(fetched), episodes.moves)
    inputs, num_support = preprocessing(pictures), support_y.shape[1]
    return [
        Task(x[:num_support], sy, x[num_support:], qy, episodes.num_ways)
        for x, sy, qy in zip(inputs, support_y, query_y, strict=True)
    ]


def num_ahead(groups: Sequence[int], device: torch.device) -> int:
    """Groups to load in the background: a position's, where a device computes meanwhile.

    A worker on a CPU has one core, and its training uses all of it: a thread would only take turns
    with the training, and measures no faster (see docs/log.md).
    """
    return 0 if device.type == "cpu" else max(_FEWEST_AHEAD, len(groups))


def blocks(keys: Iterator[Key]) -> Iterator[list[Key]]:
    """The same keys, as many at a time as are drawn by one call."""
    while True:
        yield list(itertools.islice(keys, _GROUPS_PER_DRAW))
