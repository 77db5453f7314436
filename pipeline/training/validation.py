"""Validation: the frozen validation episodes, by the same code that evaluation runs."""

from __future__ import annotations

from dataclasses import replace

from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.engine.population import population_statistics
from pipeline.evaluation.scoring import score_sets
from pipeline.runtime.context import Context
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes
from pipeline.training.loop import Validate


def validator(store: Store, episodes: dict[str, FrozenEpisodes], context: Context) -> Validate:
    """Mean accuracy over all validation sets, each set counting the same."""

    def validate(learner: Learner, step: int) -> tuple[float, Learner]:
        ready = measured(learner, learner.params, store, context)
        scores = score_sets(ready, store, episodes, context=context).values()
        return sum(float(one.accuracy.mean()) for one in scores) / len(scores), ready

    return validate


def measured(learner: Learner, params: Params, store: Store, context: Context) -> Learner:
    """The learner with these parameters and, where its batch norm needs them, statistics."""
    statistics = None
    if learner.model.batch_norm == "running":
        statistics = population_statistics(learner, params, store, context)
    return replace(learner, params=params, model=learner.model.with_statistics(statistics))
