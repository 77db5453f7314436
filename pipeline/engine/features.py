"""Learners on features that were computed before: the same `adapt` and `predict`, without pictures.

D features.
"""

from __future__ import annotations

from pipeline.backbones.pixels import Pixels, PixelsConfig
from pipeline.core.functional import BACKBONE, Model
from pipeline.core.types import Params
from pipeline.engine.learner import Learner


def caches_features(learner: Learner) -> bool:
    """Whether a picture's features are the same in every episode."""
    fixed = learner.model.batch_norm == "running" and learner.model.statistics is not None
    plain = isinstance(learner.model.skeleton, Pixels)
    return learner.algorithm.embeds_each_example and (fixed or plain)


def feature_head(learner: Learner) -> tuple[Model, Params]:
    """A model that takes features [B, D] for pictures, and the algorithm's own parameters."""
    dim = learner.model.feature_dim
    head = Model(Pixels(PixelsConfig(), (1, 1, dim)), dim, "running")
    return head, {n: p for n, p in learner.params.items() if not n.startswith(BACKBONE)}
