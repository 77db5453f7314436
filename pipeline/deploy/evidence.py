"""What the release gate decides on, measured from the bundle's bytes and never read from a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from pipeline.engine.learner import Learner
from pipeline.evaluation.corruptions import SEVERITIES
from pipeline.evaluation.robustness import Robustness, RobustnessConfig, score_spoilt
from pipeline.evaluation.scoring import EpisodeScores, score_sets
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes

Scores: TypeAlias = Mapping[str, EpisodeScores]
"""One learner's answers on the frozen test episodes, by setting ("5w1s")."""

LATENCY_WAYS, LATENCY_QUERIES = 5, 15
_WARM_UP, _RUNS, _FEWEST_RUNS = 3, 50, 5
_ENOUGH_SECONDS = 10.0


@dataclass(frozen=True)
class Answers:
    """What a learner answered on the frozen test episodes."""

    scores: Scores
    """With its own temperature."""
    robustness: Robustness | None
    """None where it is not tried with spoilt queries."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of adapt and predict: 5 ways, 1 shot, 15 queries, one thread, in process."""

    median_milliseconds: float
    p95_milliseconds: float
    num_runs: int

    def as_json(self) -> dict[str, Any]:
        """For release.json."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """What serving takes."""

    latency: Latency
    weights_bytes: int


def answers(
    learner: Learner,
    store: Store,
    episodes: Mapping[str, FrozenEpisodes],
    config: RobustnessConfig,
    *,
    primary: str,
    temperature: float,
    advance: Callable[[int], None] | None = None,
) -> Answers:
    """Score a learner on every set of episodes and, on the first of one set, with spoilt queries.

    Args:
        primary: name of the set whose queries are spoilt.
    """
    scores = score_sets(learner, store, episodes, temperature=temperature, advance=advance)
    if config.num_episodes == 0:
        return Answers(scores, None)
    spoilt = score_spoilt(
        learner, store, episodes[primary], scores[primary], config, advance=advance
    )
    return Answers(scores, spoilt)


def num_scored(
    episodes: Mapping[str, FrozenEpisodes], config: RobustnessConfig, primary: str
) -> int:
    """How many episodes `answers` works through."""
    clean = {name: len(one.support_rows) for name, one in episodes.items()}
    return sum(clean.values()) + len(SEVERITIES) * min(clean[primary], config.num_episodes)


def measure_latency(learner: Learner) -> Latency:
    """Time a small episode over and over; its pictures are noise, which takes as long as any.

    The median of many is what a rule may lean on: other work on the machine makes some runs slow,
    seldom half of them. A slow learner is timed fewer times, so that this ends within seconds.
    """
    rng = np.random.default_rng(0)
    shape = (LATENCY_WAYS + LATENCY_QUERIES, *learner.preprocessing.image_shape)
    pictures = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = torch.arange(LATENCY_WAYS)

    def once() -> float:
        begin = time.perf_counter()
        adapted = learner.adapt(pictures[:LATENCY_WAYS], labels, LATENCY_WAYS)
        learner.predict(adapted, pictures[LATENCY_WAYS:])
        return time.perf_counter() - begin

    with _one_thread(), torch.no_grad():
        for _ in range(_WARM_UP):
            once()
        begin = time.perf_counter()
        times: list[float] = []
        while len(times) < _RUNS and (
            len(times) < _FEWEST_RUNS or time.perf_counter() - begin < _ENOUGH_SECONDS
        ):
            times.append(once())
    median, p95 = (round(1000 * float(np.quantile(times, q)), 3) for q in (0.5, 0.95))
    return Latency(median, p95, len(times))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
