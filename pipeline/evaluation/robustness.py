"""How well a learner answers when queries are spoilt and the support examples are not.

E episodes, Q queries of an episode, K corruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt

from pipeline.core.config import Section
from pipeline.engine.learner import Learner
from pipeline.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pipeline.evaluation.scoring import EpisodeScores, score
from pipeline.store.reader import Pixels, Store
from pipeline.tasks.frozen import FrozenEpisodes

_DIGITS = 4
_NAMES = tuple(CORRUPTIONS)


class RobustnessConfig(Section):
    """On what a learner is tried with spoilt queries."""

    num_episodes: NonNegativeInt = 100
    """Test episodes of the gate's first primary setting, at each severity; 0: not tried."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of noise, places and directions."""


@dataclass(frozen=True)
class Robustness:
    """Answers to the same episodes, clean and spoilt."""

    setting: str
    clean: EpisodeScores
    spoilt: Mapping[int, EpisodeScores]
    """By severity."""
    corruption: npt.NDArray[np.int64]
    """[E, Q] which corruption each query got: its place in the table."""

    def accuracy(self, severity: int) -> float:
        """Mean over all queries, so over the corruptions, which have equal shares."""
        return float(self.spoilt[severity].correct.mean())

    def drop(self, severity: int) -> float:
        """Accuracy that is lost against the same episodes clean."""
        return float(self.clean.correct.mean()) - self.accuracy(severity)

    def as_json(self) -> dict[str, Any]:
        """For the bundle's evidence."""
        return {
            "setting": self.setting,
            "episodes": len(self.corruption),
            "clean": round(float(self.clean.correct.mean()), _DIGITS),
            "severities": {
                str(severity): {
                    "accuracy": round(self.accuracy(severity), _DIGITS),
                    "corruptions": self._by_corruption(severity),
                }
                for severity in self.spoilt
            },
        }

    def _by_corruption(self, severity: int) -> dict[str, float]:
        correct = self.spoilt[severity].correct
        return {
            name: round(float(correct[self.corruption == k].mean()), _DIGITS)
            for k, name in enumerate(_NAMES)
            if (self.corruption == k).any()
        }


def score_spoilt(
    learner: Learner,
    store: Store,
    episodes: FrozenEpisodes,
    clean: EpisodeScores,
    config: RobustnessConfig,
    *,
    advance: Callable[[int], None] | None = None,
) -> Robustness:
    """Score the first episodes of a set with spoilt queries, at each severity.

    Each query gets one of the K corruptions in turn, so a severity costs what a clean set costs,
    and every class meets all of them. Two learners get the very same pictures.

    Args:
        clean: the learner's answers to the same set as it is.
    """
    few = _first(episodes, config.num_episodes)
    turn = np.add.outer(np.arange(len(few.query_rows)), np.arange(few.query_rows.shape[1]))
    corruption = turn % len(_NAMES)
    virtual = few.query_rows.astype(np.int64) + store.num_rows * (1 + corruption)
    marked = replace(few, query_rows=virtual)
    return Robustness(
        setting=episodes.name,
        clean=_first_answers(clean, config.num_episodes),
        spoilt={
            severity: score(
                learner, SpoiltStore(store, severity, config.seed), marked, advance=advance
            )
            for severity in SEVERITIES
        },
        corruption=corruption,
    )


@dataclass(frozen=True)
class SpoiltStore:
    """A store with the spoilt twins of all its rows behind them, made when they are asked for.

    With R rows, row r + R (1 + k) is row r under the k-th corruption.
    """

    store: Store
    severity: int
    seed: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of every picture."""
        return self.store.image_shape

    @property
    def folder(self) -> Path:
        """Of the store."""
        return self.store.folder

    def gather(self, rows: npt.NDArray[Any]) -> Pixels:
        """Pictures [n, C, H, W] of rows [n]."""
        twin, source = np.divmod(np.asarray(rows, np.int64), self.store.num_rows)
        pictures = self.store.gather(source)
        for k in np.unique(twin[twin > 0]):
            chosen = twin == k
            pictures[chosen] = corrupt(
                pictures[chosen],
                source[chosen],
                name=_NAMES[k - 1],
                severity=self.severity,
                seed=self.seed,
            )
        return pictures


def _first(episodes: FrozenEpisodes, most: int) -> FrozenEpisodes:
    """The first episodes of a set: they were drawn independently of each other."""
    return replace(
        episodes,
        support_rows=episodes.support_rows[:most],
        support_labels=episodes.support_labels[:most],
        query_rows=episodes.query_rows[:most],
        query_labels=episodes.query_labels[:most],
        classes=episodes.classes[:most],
    )


def _first_answers(scores: EpisodeScores, most: int) -> EpisodeScores:
    return EpisodeScores(
        correct=scores.correct[:most],
        confidence=scores.confidence[:most],
        query_class=scores.query_class[:most],
        predicted_class=scores.predicted_class[:most],
    )
