"""Accuracy of a finished learner on frozen test episodes, on all workers.

A module of its own, for workers import what they run by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.config import Section
from pipeline.engine.learner import load_learner
from pipeline.evaluation.scoring import score
from pipeline.evaluation.statistics import mean_interval
from pipeline.runtime.context import Context
from pipeline.store.reader import open_store
from pipeline.tasks.frozen import read_episodes


class ScoreJob(Section):
    """A finished learner and the episodes to score it on, as the workers get them."""

    learner: Path
    store: Path
    tasks: Path
    settings: tuple[str, ...]


def score_all(job: ScoreJob, context: Context) -> dict[str, Any]:
    """What every worker does: accuracy with its 95 % interval in each setting."""
    store, learner = open_store(job.store), load_learner(job.learner, device=context.device)
    episodes = read_episodes(job.tasks, "test")
    results = {}
    for setting in job.settings:
        scores = score(learner, store, episodes[setting], context=context)
        interval = mean_interval(scores.accuracy)
        results[setting] = {
            "accuracy": round(interval.mean, 5),
            "ci95": round(interval.half_width, 5),
            "episodes": len(scores.accuracy),
            "split_hash": store.split_hash("test"),
        }
    return results
