"""Score a learner on frozen episodes, with the `adapt` and `predict` that serving runs.

E episodes, S support rows, Q query rows, N ways, R distinct rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import ArtefactError
from pipeline.engine.features import caches_features, feature_head
from pipeline.engine.learner import Learner
from pipeline.runtime.collectives import gather_shares, share, stop_together
from pipeline.runtime.context import SINGLE, Context
from pipeline.tasks.frozen import FrozenEpisodes

_ROWS_PER_CHUNK = 256  # fixed, so that features do not depend on the number of workers
_EPISODES_PER_CHUNK = 64
_SLOW_EPISODES_PER_CHUNK = 4
"""Of those that are computed one by one: between two chunks a wish to stop is heard."""


@dataclass(frozen=True)
class EpisodeScores:
    """What a learner answered to every query of E episodes with Q queries each."""

    correct: npt.NDArray[np.bool_]
    """[E, Q]"""
    confidence: npt.NDArray[np.float32]
    """[E, Q] probability of the answer"""
    query_class: npt.NDArray[np.int32]
    """[E, Q] the store's class id of the query"""
    predicted_class: npt.NDArray[np.int32]
    """[E, Q] the store's class id of the answer"""

    @property
    def accuracy(self) -> npt.NDArray[np.float64]:
        """[E] share of right answers in each episode."""
        means: npt.NDArray[np.float64] = self.correct.mean(axis=1, dtype=np.float64)
        return means


@runtime_checkable
class PictureSource(Protocol):
    """What episodes' rows are rows of: a store, or one whose pictures were changed."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of every picture."""

    @property
    def folder(self) -> Path:
        """For messages."""

    def gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Pictures [n, C, H, W] of rows [n]."""


class Features(NamedTuple):
    """Pictures embedded once, for every set of episodes that uses them."""

    rows: npt.NDArray[Any]
    """[R] store rows, ascending."""
    values: Tensor
    """[R, D]"""


def score_sets(
    learner: Learner,
    store: PictureSource,
    episodes: Mapping[str, FrozenEpisodes],
    *,
    context: Context = SINGLE,
    temperature: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> dict[str, EpisodeScores]:
    """`score` on several sets of episodes; where features are cached, all sets share them."""
    features = None
    if caches_features(learner):
        features = embed_once(learner, store, episodes.values(), context)
    one = partial(
        score, learner, store, context=context, features=features, temperature=temperature
    )
    return {name: one(frozen, advance=advance) for name, frozen in episodes.items()}


def score(
    learner: Learner,
    store: PictureSource,
    episodes: FrozenEpisodes,
    *,
    context: Context = SINGLE,
    cache_features: bool = True,
    features: Features | None = None,
    temperature: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> EpisodeScores:
    """Adapt to every support set, answer every query.

    Where pictures enter only through their own features (metric learners with fixed batch-norm
    statistics), each distinct picture is embedded once and the same `adapt` and `predict` run on
    the features; otherwise episode by episode on pictures.

    Args:
        context: the workers that share the work; each gets the whole result.
        cache_features: False looks at the pictures of each episode anew, to check the cache.
        features: of all the rows of these episodes, if they are at hand.
        temperature: what the logits are divided by; it changes confidences, never an answer.
        advance: called with the number of episodes that this worker has just finished.

    Raises:
        StoppedError: on every worker, when one was asked to stop.
    """
    own = share(len(episodes.support_rows), context.rank, context.world_size)
    cached = cache_features and caches_features(learner)
    logits = _logits(learner, store, episodes, context, features, cached=cached)
    parts = []
    size = _EPISODES_PER_CHUNK if cached else _SLOW_EPISODES_PER_CHUNK
    for start in range(own.start, own.stop, size):
        if context.stopping():
            break
        chunk = range(start, min(start + size, own.stop))
        parts.append(_best(logits(chunk), temperature))
        if advance is not None:
            advance(len(chunk))
    width = episodes.query_rows.shape[1]
    nothing = torch.zeros(0, width, 2, dtype=torch.float64, device=context.device)
    local = torch.cat(parts) if parts else nothing
    context.wait_for_all("scores")
    stop_together(context, "an evaluation")
    answers = gather_shares(local, len(episodes.support_rows), context).cpu().numpy()
    return _as_scores(episodes, answers[..., 0], answers[..., 1].astype(np.int64))


def _best(logits_eQN: Tensor, temperature: float) -> Tensor:
    """Confidence and answer [e, Q, 2]; the answer is what serving gives, before any temperature."""
    answer = F.softmax(logits_eQN, dim=-1).argmax(dim=-1)
    confidence = F.softmax(logits_eQN / temperature, dim=-1).amax(dim=-1)
    return torch.stack([confidence.double(), answer.double()], dim=-1)


def query_logits(
    learner: Learner, store: PictureSource, episodes: Mapping[str, FrozenEpisodes]
) -> dict[str, npt.NDArray[np.float64]]:
    """Logits [E, Q, N] of every query of several sets, by label; in one process.

    The answers of `score` are their maxima. Large: 8 bytes for each query and class.
    """
    cached = caches_features(learner)
    features = embed_once(learner, store, episodes.values()) if cached else None
    found = {}
    for name, one in episodes.items():
        logits = _logits(learner, store, one, SINGLE, features, cached=cached)
        num = len(one.support_rows)
        starts = range(0, num, _EPISODES_PER_CHUNK)
        chunks = [logits(range(i, min(i + _EPISODES_PER_CHUNK, num))) for i in starts]
        found[name] = torch.cat(chunks).double().cpu().numpy()
    return found


def embed_once(
    learner: Learner,
    store: PictureSource,
    episodes: Iterable[FrozenEpisodes],
    context: Context = SINGLE,
) -> Features:
    """Features of every distinct picture of some sets of episodes."""
    used = [rows.ravel() for one in episodes for rows in (one.support_rows, one.query_rows)]
    rows = np.unique(np.concatenate(used))
    return Features(rows, embed_rows(learner, store, rows, context))


def _logits(
    learner: Learner,
    store: PictureSource,
    episodes: FrozenEpisodes,
    context: Context,
    features: Features | None,
    *,
    cached: bool,
) -> Callable[[range], Tensor]:
    """Logits [e, Q, N] of a chunk of episodes.

    Raises:
        ArtefactError: the store holds pictures of another shape.
    """
    if learner.preprocessing.image_shape != store.image_shape:
        raise ArtefactError(
            f"the learner takes pictures of shape {learner.preprocessing.image_shape}, the store "
            f"{store.folder} holds {store.image_shape}. Evaluate on a store made with its settings."
        )
    if cached:
        return _on_features(
            learner, episodes, features or embed_once(learner, store, [episodes], context)
        )
    return _on_pictures(learner, store, episodes, context)


def _on_features(
    learner: Learner, episodes: FrozenEpisodes, features: Features
) -> Callable[[range], Tensor]:
    """Logits [e, Q, N] of a chunk of episodes, from features embedded once."""
    wanted = np.concatenate([episodes.support_rows, episodes.query_rows], axis=1)
    index = torch.as_tensor(np.searchsorted(features.rows, wanted))
    features_RD = features.values
    labels = torch.as_tensor(episodes.support_labels.astype(np.int64))
    num_support = episodes.support_rows.shape[1]
    head, own_params = feature_head(learner)

    def one(support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        algorithm = learner.algorithm
        adapted = algorithm.adapt(head, own_params, support, support_y, episodes.num_ways)
        return algorithm.predict(head, own_params, adapted, query).float()

    def logits(chunk: range) -> Tensor:
        picked = features_RD[index[chunk.start : chunk.stop].to(features_RD.device)]
        chosen_labels = labels[chunk.start : chunk.stop].to(features_RD.device)
        result: Tensor = torch.vmap(one)(
            picked[:, :num_support], chosen_labels, picked[:, num_support:]
        )
        return result

    return logits


def _on_pictures(
    learner: Learner, store: PictureSource, episodes: FrozenEpisodes, context: Context
) -> Callable[[range], Tensor]:
    """Logits [e, Q, N] of a chunk of episodes, one episode at a time."""

    def one(e: int) -> Tensor:
        support = _pictures(store, episodes.support_rows[e], context)
        labels = torch.as_tensor(episodes.support_labels[e].astype(np.int64), device=context.device)
        adapted = learner.adapt(support, labels, episodes.num_ways)
        return learner.logits(adapted, _pictures(store, episodes.query_rows[e], context))

    return lambda chunk: torch.stack([one(e) for e in chunk])


def embed_rows(
    learner: Learner, store: PictureSource, rows: npt.NDArray[Any], context: Context = SINGLE
) -> Tensor:
    """Features [R, D] of store rows [R], shared among the workers in chunks of a fixed size."""
    chunks = [rows[i : i + _ROWS_PER_CHUNK] for i in range(0, len(rows), _ROWS_PER_CHUNK)]
    own = share(len(chunks), context.rank, context.world_size)
    padded = torch.zeros(
        len(own), _ROWS_PER_CHUNK, learner.model.feature_dim, device=context.device
    )
    with torch.no_grad():
        for i, chunk in enumerate(chunks[own.start : own.stop]):
            if context.stopping():
                break
            inputs = learner.preprocessing(_pictures(store, chunk, context))
            features, _ = learner.model.features(learner.params, inputs, learner.model.statistics)
            padded[i, : len(chunk)] = features
    context.wait_for_all("features")
    stop_together(context, "an evaluation")
    return gather_shares(padded, len(chunks), context).flatten(0, 1)[: len(rows)]


def _pictures(store: PictureSource, rows: npt.NDArray[Any], context: Context) -> Tensor:
    return torch.as_tensor(store.gather(rows)).to(context.device)


def _as_scores(
    episodes: FrozenEpisodes, confidence: npt.NDArray[np.float64], answers: npt.NDArray[np.int64]
) -> EpisodeScores:
    classes = episodes.classes.astype(np.int32)
    return EpisodeScores(
        correct=answers == episodes.query_labels,
        confidence=confidence.astype(np.float32),
        query_class=np.take_along_axis(classes, episodes.query_labels.astype(np.int64), axis=1),
        predicted_class=np.take_along_axis(classes, answers, axis=1),
    )
