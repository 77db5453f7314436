"""Data files for `dvc plots show`: lists of records that the templates of DVC understand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.results import MODEL, Evaluation, rounded

Records = list[dict[str, Any]]


def plot_records(evaluation: Evaluation) -> Mapping[str, Records]:
    """Records by file name."""
    return {
        "training_loss.json": _curve(evaluation, "loss"),
        "validation_accuracy.json": _curve(evaluation, "val_accuracy"),
        "accuracy.json": _accuracy(evaluation),
        "groups.json": _groups(evaluation),
        "reliability.json": _reliability(evaluation),
        "hardest_pairs.json": _hardest_pairs(evaluation),
    }


def _curve(evaluation: Evaluation, key: str) -> Records:
    points = [p for p in evaluation.history if p.get(key) is not None]
    return [{"step": p["step"], key: rounded(p[key])} for p in points]


def _accuracy(evaluation: Evaluation) -> Records:
    return [
        {
            "learner": f"{setting} {name}",
            "accuracy": rounded(interval.mean),
            "ci95": rounded(interval.half_width),
        }
        for setting, result in evaluation.settings.items()
        for name, interval in result.accuracy.items()
    ]


def _groups(evaluation: Evaluation) -> Records:
    return [
        {"group": f"{setting} {g.group}", "accuracy": rounded(g.accuracy.mean)}
        for setting, result in evaluation.settings.items()
        for g in result.groups
    ]


def _reliability(evaluation: Evaluation) -> Records:
    bins = evaluation.headline.calibration
    return [
        {
            "confidence": rounded(c),
            "accuracy": rounded(a),
            "perfect": rounded(c),
            "queries": int(n),
        }
        for c, a, n in zip(bins.confidence, bins.accuracy, bins.counts, strict=True)
        if n
    ]


def _hardest_pairs(evaluation: Evaluation) -> Records:
    classes, answers = evaluation.store.classes, evaluation.hardest_setting
    return [
        {
            "pair": f"{classes[p.true_class].name} taken for {classes[p.answered_class].name}",
            "rate": rounded(p.rate),
            "queries": p.asked,
            "setting": answers,
        }
        for p in evaluation.hardest
    ]


def episode_columns(evaluation: Evaluation) -> dict[str, list[Any]]:
    """The per-episode table: setting, episode, learner, accuracy; the model's rows come first."""
    columns: dict[str, list[Any]] = {"setting": [], "episode": [], "learner": [], "accuracy": []}
    for setting, result in evaluation.settings.items():
        for name, scores in sorted(result.scores.items(), key=lambda item: item[0] != MODEL):
            accuracy = scores.accuracy.tolist()
            columns["setting"] += [setting] * len(accuracy)
            columns["episode"] += range(len(accuracy))
            columns["learner"] += [name] * len(accuracy)
            columns["accuracy"] += accuracy
    return columns
