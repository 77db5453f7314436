"""What traffic is compared with: the version's own answers to the validation episodes.

B bins of rank, E episodes, Q queries, S support examples, n queries of a shape, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.core.errors import ArtefactError
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.drift import BINS, SIGNALS, Floats, Reference
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version
from pipeline.evaluation.scoring import Features, embed_once
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes

_WAYS, _SHOTS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20), (1, 2, 3, 4, 5, 7, 10)
"""Shapes of support set that a reference has, as far as the episodes go"""
_LEAST_QUERIES = 5
"""Of a class, that are left where others are taken for support"""
_QUERIES_PER_SHAPE = 3000
_LEAST_EPISODES, _SLOW_EPISODES = 20, 20
_ROWS_PER_PASS = 16
_DIGITS = 6


@dataclass(frozen=True)
class _Shape:
    """Episodes of one shape, made of larger ones."""

    ways: int
    shots: int
    episodes: FrozenEpisodes

    def split(self, e: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Support rows [S] and their labels [S], query rows [Q] of an episode.

        The first classes of the episode and the first examples of each; where there are too few of
        these, the first queries are learned too.
        """
        one = self.episodes
        support, queries = [], []
        for label in range(self.ways):
            own = one.support_rows[e][one.support_labels[e] == label]
            asked = one.query_rows[e][one.query_labels[e] == label]
            every = np.concatenate([own, asked])
            support.append(every[: self.shots])
            queries.append(every[max(self.shots, len(own)) :])
        labels = np.repeat(np.arange(self.ways), self.shots)
        return np.concatenate(support), labels, np.concatenate(queries)

    def classes(self, e: int) -> npt.NDArray[Any]:
        """Class ids [Q] of the queries of `split`."""
        one = self.episodes
        taken = max(0, self.shots - one.num_shots)
        return np.repeat(one.classes[e][: self.ways], one.num_queries - taken)


def make_reference(
    bundle: Bundle, store: Store, episodes: Mapping[str, FrozenEpisodes]
) -> Reference:
    """Answer validation episodes as the service would, and keep how the answers are spread.

    Support sets of other shapes are cut out of the frozen ones, since the service is asked with
    any. Learners that need their support set to embed a picture are slow: they get the frozen
    shapes alone, and fewer episodes.

    Raises:
        ArtefactError: these are test episodes, which must not shape what serves.
    """
    if wrong := sorted({one.split for one in episodes.values()} - {"val"}):
        raise ArtefactError(
            f"traffic is compared with validation episodes, not with those of {', '.join(wrong)}. "
            "Read the split 'val'."
        )
    version = Version(ModelRef(name="", version=None, bundle=bundle.digest), bundle, _ROWS_PER_PASS)
    features = None
    if version.embeds_alone:
        features = embed_once(version.learner, store, episodes.values())
    shapes = list(_shapes(episodes, alone=version.embeds_alone))
    found = [_seen(version, store, shape, features) for shape in shapes]
    parts = [_spread(values, classes) for values, classes in found]
    return Reference(
        split="val",
        episodes={name: one.digest for name, one in episodes.items()},
        classes=len(np.unique(np.concatenate([classes for _, classes in found]))),
        shapes=[(one.ways, one.shots) for one in shapes],
        edges=[edges.round(_DIGITS).tolist() for edges, _, _ in parts],
        shares=[shares.round(_DIGITS).tolist() for _, shares, _ in parts],
        noise=np.mean([noise for _, _, noise in parts], axis=0).round(2 * _DIGITS).tolist(),
    )


def _shapes(episodes: Mapping[str, FrozenEpisodes], *, alone: bool) -> Iterator[_Shape]:
    """The frozen ones and, where that is cheap, all that can be cut out of them."""
    own = {(one.num_ways, one.num_shots): one for one in episodes.values()}
    wanted = {(w, s) for w in _WAYS for s in _SHOTS} if alone else set[tuple[int, int]]()
    for ways, shots in sorted(wanted | set(own)):
        fit = [one for one in episodes.values() if _fits(one, ways, shots)]
        if source := own.get((ways, shots)) or min(fit, key=lambda one: one.num_ways, default=None):
            yield _Shape(ways, shots, source)


def _fits(one: FrozenEpisodes, ways: int, shots: int) -> bool:
    left = one.num_queries - max(0, shots - one.num_shots)
    return one.num_ways >= ways and left >= min(_LEAST_QUERIES, one.num_queries)


def _seen(
    version: Version, store: Store, shape: _Shape, features: Features | None
) -> tuple[Floats, npt.NDArray[Any]]:
    """Similarity and confidence [2, n] of queries, and their classes [n]."""
    values, classes = [], []
    for e in range(_num_episodes(shape, slow=features is None)):
        support, labels, queries = shape.split(e)
        own = asked = None
        if features is not None:
            own, asked = (
                features.values[torch.as_tensor(np.searchsorted(features.rows, rows))]
                for rows in (support, queries)
            )
        # Where features are at hand the pictures are not looked at.
        pictures = store.gather(support[:1] if features is not None else support)
        ready = version.learn(pictures, labels.tolist(), shape.ways, own)
        pictures = store.gather(queries[:1] if features is not None else queries)
        answers = version.answer(ready, pictures, asked)
        both = torch.stack([answers.similarity.amax(dim=1), answers.probabilities.amax(dim=1)])
        values.append(both.double().cpu().numpy())
        classes.append(shape.classes(e))
    return np.concatenate(values, axis=1), np.concatenate(classes)


def _num_episodes(shape: _Shape, *, slow: bool) -> int:
    there = len(shape.episodes.support_rows)
    if slow:
        return min(there, _SLOW_EPISODES)
    per_episode = len(shape.classes(0))
    return min(there, max(_LEAST_EPISODES, math.ceil(_QUERIES_PER_SHAPE / per_episode)))


def _spread(values_2n: Floats, classes_n: npt.NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Edges [2, B - 1], shares [2, B], and the covariance [2B, 2B] of these over the classes.

    A class with m queries, of which h lie in each bin, contributes h - m p to the deviation from
    the shares p; classes are independent draws.
    """
    inner = np.arange(1, BINS) / BINS
    edges = np.quantile(values_2n, inner, axis=1).T.round(_DIGITS)
    bins_2n = np.stack(
        [np.searchsorted(edges[i], values_2n[i], side="right") for i in range(len(SIGNALS))]
    )
    _, own_n = np.unique(classes_n, return_inverse=True)
    num_classes = int(own_n.max()) + 1
    counts_C2B = np.zeros((num_classes, len(SIGNALS), BINS))
    for i in range(len(SIGNALS)):
        np.add.at(counts_C2B[:, i], (own_n, bins_2n[i]), 1)
    n = values_2n.shape[1]
    shares = counts_C2B.sum(axis=0) / n
    rest = counts_C2B - counts_C2B[:, :1].sum(axis=2, keepdims=True) * shares
    rest = rest.reshape(num_classes, -1) / n
    few = num_classes / max(1, num_classes - 1)
    return edges, shares, few * rest.T @ rest
