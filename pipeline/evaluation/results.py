"""What an evaluation found: every learner's answers on every setting, and the numbers from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.statistics import (
    Calibration,
    ConfusedPair,
    GroupAccuracy,
    Interval,
    accuracy_by_group,
    calibration,
    confusions,
    mean_interval,
    paired_difference,
    worst_pairs,
)
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes

MODEL = "model"
"""The evaluated learner's name among its baselines."""
INTERVAL = "95 %, mean over episodes ± 1.96 s / sqrt(episodes)"

_DIGITS = 5


@dataclass(frozen=True)
class SettingResult:
    """One setting ("5w1s"): the same episodes for every learner."""

    episodes: FrozenEpisodes
    scores: Mapping[str, EpisodeScores]
    """By learner, the model first."""
    accuracy: Mapping[str, Interval]
    """By learner, in the same order."""
    difference: Mapping[str, Interval]
    """Model minus baseline, paired by episode, by baseline."""
    calibration: Calibration
    groups: Sequence[GroupAccuracy]
    batch_norm: str

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.episodes.num_ways


@dataclass(frozen=True)
class Evaluation:
    """Everything that the report, the plots and metrics.json are made from."""

    title: str
    store: Store
    settings: Mapping[str, SettingResult]
    hardest: Sequence[ConfusedPair]
    """The pairs of classes that the model confuses most often."""
    hardest_setting: str
    facts: Mapping[str, Any]
    """Of the learner: algorithm, backbone, where it comes from, digests."""
    history: Sequence[Mapping[str, Any]]
    """Of training: {"step", "loss", "val_accuracy"}."""
    store_report: Mapping[str, Any]
    """What preprocessing dropped."""
    num_examples: int
    """Episodes to show as pictures."""

    @property
    def headline(self) -> SettingResult:
        """The setting that is shown first: fewest ways, then fewest shots."""
        return next(iter(self.settings.values()))


def measure(
    episodes: FrozenEpisodes,
    scores: Mapping[str, EpisodeScores],
    groups: Sequence[str],
    *,
    num_bins: int,
    batch_norm: str,
) -> SettingResult:
    """All numbers of one setting.

    Args:
        scores: by learner, the model under `MODEL`.
        groups: the group of every class of the store.
    """
    ours = scores[MODEL]
    baselines = {name: theirs for name, theirs in scores.items() if name != MODEL}
    return SettingResult(
        episodes=episodes,
        scores=scores,
        accuracy={name: mean_interval(s.accuracy) for name, s in scores.items()},
        difference={n: paired_difference(ours.accuracy, s.accuracy) for n, s in baselines.items()},
        calibration=calibration(ours.confidence, ours.correct, num_bins),
        groups=accuracy_by_group(ours.correct, ours.query_class, groups),
        batch_norm=batch_norm,
    )


def hardest_pairs(
    settings: Mapping[str, SettingResult], num_pairs: int
) -> tuple[list[ConfusedPair], str]:
    """The worst pairs of the setting in which pairs of classes met most often, and its name."""
    name = max(
        settings, key=lambda n: settings[n].scores[MODEL].correct.size * _rivals(settings[n])
    )
    ours = settings[name].scores[MODEL]
    table = confusions(ours.query_class, ours.predicted_class)
    return worst_pairs(table, num_pairs), name


def _rivals(result: SettingResult) -> int:
    """Classes that a query could be taken for."""
    return result.episodes.num_ways - 1


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """The content of metrics.json: domain -> setting -> numbers and their protocol."""
    settings = {name: _setting_metrics(result) for name, result in evaluation.settings.items()}
    return {evaluation.store.domain: settings}


def protocol(result: SettingResult) -> dict[str, Any]:
    """Everything that a number of this setting must name."""
    return {
        **result.episodes.protocol,
        "episodes_digest": result.episodes.digest,
        "batch_norm": result.batch_norm,
        "interval": INTERVAL,
    }


def _setting_metrics(result: SettingResult) -> dict[str, Any]:
    return {
        **_interval(result.accuracy[MODEL]),
        "episodes": len(result.episodes.support_rows),
        "chance": rounded(result.chance),
        "ece": rounded(result.calibration.error),
        "per_group": {
            g.group: {**_interval(g.accuracy), "queries": g.num_queries, "classes": g.num_classes}
            for g in result.groups
        },
        "baselines": {
            name: {
                **_interval(result.accuracy[name]),
                "difference": rounded(difference.mean),
                "difference_ci95": rounded(difference.half_width),
            }
            for name, difference in result.difference.items()
        },
        "protocol": protocol(result),
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"accuracy": rounded(interval.mean), "ci95": rounded(interval.half_width)}


def rounded(value: float) -> float | None:
    """A number for JSON: five decimals are finer than any interval; None if it is not finite."""
    return round(float(value), _DIGITS) if math.isfinite(value) else None
