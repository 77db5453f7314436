"""What a meta-trained model has to beat, on the same episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.engine.learner import Learner, load_learner
from pipeline.engine.population import population_statistics
from pipeline.runtime.context import SINGLE, Context
from pipeline.store.reader import Store


def baselines(
    learner: Learner, pretrained: Path, store: Store, *, seed: int, context: Context = SINGLE
) -> dict[str, Learner]:
    """The floor, the chance of the architecture alone, and what no meta-training would give.

    pixels: nearest class mean of raw pixels. untrained: the same algorithm on a fresh backbone.
    pretrained: nearest class mean of the pre-trained features.

    Args:
        pretrained: folder of the pre-trained learner, with a nearest-centroid head.
        seed: of the untrained weights.
    """
    return {
        "pixels": pixel_learner(learner),
        "untrained": untrained(learner, store, seed=seed, context=context),
        "pretrained": load_learner(pretrained, device=context.device),
    }


def pixel_learner(learner: Learner) -> Learner:
    """Nearest class mean of raw pixels, for pictures of the same shape."""
    algorithm = NearestCentroid(metric="euclidean")
    backbone = BackboneSpec(
        name="pixels", settings={}, image_shape=learner.preprocessing.image_shape
    )
    model = build_model(backbone, algorithm.batch_norm)
    return replace(
        learner, algorithm=algorithm, model=model, params={}, backbone=backbone, origin={}
    )


def untrained(learner: Learner, store: Store, *, seed: int, context: Context = SINGLE) -> Learner:
    """The learner as it was before any training."""
    generator = torch.Generator().manual_seed(seed)
    own = learner.algorithm.init(learner.model.feature_dim, generator)
    fresh = {**init_params(learner.backbone, seed), **own}
    params = {n: v.to(context.device) for n, v in fresh.items()}
    assert set(params) == set(learner.params), "an algorithm's parameters do not depend on training"
    statistics = None
    if learner.model.batch_norm == "running":
        statistics = population_statistics(learner, params, store, context)
    model = learner.model.with_statistics(statistics)
    return replace(learner, params=params, model=model, origin={"untrained_seed": seed})
