"""One rule of the release gate: what was measured, what it had to be, and how it came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.statistics import BootstrapInterval, class_bootstrap

RuleName: TypeAlias = Literal[
    "finite",
    "floor",
    "beats_baseline",
    "comparable",
    "beats_champion",
    "no_harm",
    "group_no_harm",
    "calibration",
    "robustness",
    "latency",
    "size",
]
AT_MOST = frozenset({"calibration", "latency", "size"})
"""Rules whose value may be at most the limit; with all others it is at least that."""


@dataclass(frozen=True)
class Rule:
    """One requirement and how it came out."""

    rule: RuleName
    setting: str | None
    value: float | None
    """What was measured; None where nothing could be."""
    limit: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Bootstrap:
    """How two learners' answers to the same queries are compared."""

    confidence: float
    """Of the two-sided interval."""
    num_draws: int
    seed: int

    def difference(
        self,
        ours: EpisodeScores,
        theirs: EpisodeScores,
        *,
        among: Sequence[int] | None = None,
        num_comparisons: int = 1,
    ) -> BootstrapInterval:
        """Accuracy of ours minus theirs, resampled by class.

        Args:
            among: classes whose queries alone count.
            num_comparisons: of how many the worst is looked for; each interval is so much wider
                that by chance one of them fails no more often than a single one would (Bonferroni).
        """
        return class_bootstrap(
            ours.query_class,
            ours.predicted_class,
            theirs.predicted_class,
            num_draws=self.num_draws,
            confidence=1 - (1 - self.confidence) / num_comparisons,
            seed=self.seed,
            among=None if among is None else np.asarray(among),
        )
