"""The gate's rules beside accuracy: calibration, groups, spoilt queries, latency and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.deploy.evidence import LATENCY_QUERIES, LATENCY_WAYS, Costs, Scores
from pipeline.deploy.rule import Bootstrap, Rule
from pipeline.evaluation.robustness import Robustness
from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.statistics import BootstrapInterval, calibration


def calibration_rules(scores: Scores, limit: float) -> Iterator[Rule]:
    """In each setting, confidences after the temperature are at most so far from accuracies."""
    for setting, ours in scores.items():
        error = calibration(ours.confidence, ours.correct).error
        reason = (
            f"{setting}: with its temperature the calibration error is {error:.4f}, "
            f"the limit is {limit:.4f}."
        )
        yield Rule("calibration", setting, error, limit, error <= limit, reason)


def group_rules(
    challenger: Scores,
    champion: Scores,
    groups: Sequence[str],
    bootstrap: Bootstrap,
    *,
    margin: float,
    min_classes: int,
) -> Iterator[Rule]:
    """In each setting, no group of classes is answered worse than by the champion.

    Args:
        groups: the group of every class of the store; classes without one have "".
        min_classes: groups with fewer are named as not judged.
    """
    for setting, ours in challenger.items():
        members = _members(ours, groups)
        if len(members) > 1:
            theirs = champion[setting]
            yield _worst_group(setting, ours, theirs, members, bootstrap, margin, min_classes)


def robustness_rules(
    ours: Robustness,
    theirs: Robustness | None,
    bootstrap: Bootstrap,
    *,
    margin: float,
    max_drops: Sequence[float],
) -> Iterator[Rule]:
    """At each severity: against the champion, or where there is none, against clean queries."""
    for severity, max_drop in zip(ours.spoilt, max_drops, strict=True):
        where = f"{ours.setting} severity {severity}"
        if theirs is not None:
            bounds = bootstrap.difference(ours.spoilt[severity], theirs.spoilt[severity])
            passed, limit = bounds.upper >= -margin, 0.0 - margin
            reason = f"{where}: with spoilt queries, against the champion, {_told(bounds, limit)}"
            yield Rule("robustness", where, bounds.upper, limit, passed, reason)
            continue
        change = -ours.drop(severity)
        reason = (
            f"{where}: spoilt queries change the accuracy by {change:+.4f} to "
            f"{ours.accuracy(severity):.4f}; the limit is {-max_drop:+.4f}."
        )
        yield Rule("robustness", where, change, -max_drop, change >= -max_drop, reason)


def budget_rules(
    costs: Costs, *, max_latency_milliseconds: float, max_weights_bytes: int
) -> Iterator[Rule]:
    """Adapting and answering are fast enough, and the weights small enough."""
    latency, size = costs.latency, costs.weights_bytes
    median = latency.median_milliseconds
    reason = (
        f"A {LATENCY_WAYS}-way 1-shot episode with {LATENCY_QUERIES} queries takes "
        f"{median:.1f} ms on one thread (median of {latency.num_runs}; 95 % within "
        f"{latency.p95_milliseconds:.1f} ms); the limit is {max_latency_milliseconds:.1f} ms."
    )
    fast = median <= max_latency_milliseconds
    yield Rule("latency", None, median, max_latency_milliseconds, fast, reason)
    reason = f"The weights have {size:,} bytes; the limit is {max_weights_bytes:,}."
    small = size <= max_weights_bytes
    yield Rule("size", None, float(size), float(max_weights_bytes), small, reason)


def _members(scores: EpisodeScores, groups: Sequence[str]) -> dict[str, list[int]]:
    """Classes that were asked for, by group, in the order of the names."""
    asked = np.unique(scores.query_class).tolist() if groups else []
    names = sorted({groups[c] for c in asked if groups[c]})
    return {name: [c for c in asked if groups[c] == name] for name in names}


def _worst_group(
    setting: str,
    ours: EpisodeScores,
    theirs: EpisodeScores,
    members: dict[str, list[int]],
    bootstrap: Bootstrap,
    margin: float,
    min_classes: int,
) -> Rule:
    limit = 0.0 - margin
    judged = {name: ids for name, ids in members.items() if len(ids) >= min_classes}
    few = [name for name in members if name not in judged]
    left_out = f" Not judged, with fewer than {min_classes} classes: {', '.join(few)}."
    if not judged:
        reason = f"{setting}: no group has enough classes.{left_out}"
        return Rule("group_no_harm", setting, None, limit, True, reason)
    bounds = {
        name: bootstrap.difference(ours, theirs, among=ids, num_comparisons=len(judged))
        for name, ids in judged.items()
    }
    worst = min(bounds, key=lambda name: bounds[name].upper)
    reason = (
        f"{setting}: of {len(judged)} groups {worst} is the worst: against the champion, "
        f"{_told(bounds[worst], limit)}{left_out if few else ''}"
    )
    passed = bounds[worst].upper >= limit
    return Rule("group_no_harm", setting, bounds[worst].upper, limit, passed, reason)


def _told(bounds: BootstrapInterval, limit: float) -> str:
    return (
        f"the accuracy differs by {bounds.difference:+.4f}, at most {bounds.upper:+.4f} over "
        f"{bounds.num_classes} resampled classes; the limit is {limit:+.4f}."
    )
