"""Scoring: caching features changes nothing, and the answers are those of adapt and predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ArtefactError
from pipeline.engine.features import caches_features
from pipeline.engine.learner import Learner, Preprocessing
from pipeline.engine.population import population_statistics
from pipeline.evaluation.baselines import pixel_learner, untrained
from pipeline.evaluation.scoring import score
from pipeline.store.reader import Store
from pipeline.tasks.frozen import read_episodes


def learner(store: Store, algorithm: ProtoNet | MAML | NearestCentroid) -> Learner:
    spec = BackboneSpec(name="conv4", settings={"width": 8}, image_shape=store.image_shape)
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    preprocessing = Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)
    one = Learner(algorithm, model, {**init_params(spec, 0), **own}, preprocessing, spec, {})
    if algorithm.batch_norm == "running":
        statistics = population_statistics(one, one.params, store)
        one = replace(one, model=model.with_statistics(statistics))
    return one


@pytest.mark.parametrize("algorithm", [ProtoNet(), NearestCentroid()])
def test_cached_features_give_the_same_answers(
    blob_store: Store, blob_tasks: Path, algorithm: ProtoNet | NearestCentroid
) -> None:
    one = learner(blob_store, algorithm)
    assert caches_features(one)
    for episodes in read_episodes(blob_tasks, "test").values():
        cached = score(one, blob_store, episodes)
        plain = score(one, blob_store, episodes, cache_features=False)
        np.testing.assert_allclose(cached.confidence, plain.confidence, rtol=1e-3, atol=1e-5)
        assert (cached.predicted_class == plain.predicted_class).mean() > 0.999


@pytest.mark.parametrize(
    "algorithm",
    [MAML(), ProtoNet(batch_norm="inductive_support"), ProtoNet(batch_norm="transductive")],
)
def test_what_depends_on_the_episode_is_not_cached(
    blob_store: Store, algorithm: ProtoNet | MAML
) -> None:
    assert not caches_features(learner(blob_store, algorithm))


def test_scores_are_the_learners_own_answers(blob_store: Store, blob_tasks: Path) -> None:
    one = learner(blob_store, MAML(num_inner_steps=1))
    episodes = read_episodes(blob_tasks, "test")["3w2s"]
    scores = score(one, blob_store, episodes)
    labels = blob_store.labels()
    for e in (0, 7):
        support = blob_store.gather(episodes.support_rows[e])
        support_y = torch.as_tensor(episodes.support_labels[e].astype(np.int64))
        adapted = one.adapt(support, support_y, 3)
        best = one.predict(adapted, blob_store.gather(episodes.query_rows[e])).max(1)
        assert scores.predicted_class[e].tolist() == episodes.classes[e][best.indices].tolist()
        np.testing.assert_allclose(scores.confidence[e], best.values, rtol=1e-5)
        assert scores.query_class[e].tolist() == labels[episodes.query_rows[e]].tolist()
    assert np.array_equal(scores.correct, scores.query_class == scores.predicted_class)
    assert np.array_equal(scores.accuracy, scores.correct.mean(1))


def test_pixels_match_nearest_centroid_written_with_numpy(
    blob_store: Store, blob_tasks: Path
) -> None:
    episodes = read_episodes(blob_tasks, "test")["5w2s"]
    scores = score(pixel_learner(learner(blob_store, ProtoNet())), blob_store, episodes)
    for e in range(len(episodes.classes)):
        support = blob_store.gather(episodes.support_rows[e]).reshape(10, -1) / 255.0
        query = blob_store.gather(episodes.query_rows[e]).reshape(20, -1) / 255.0
        means = np.stack([support[episodes.support_labels[e] == n].mean(0) for n in range(5)])
        nearest = ((query[:, None] - means[None]) ** 2).sum(-1).argmin(1)
        assert scores.predicted_class[e].tolist() == episodes.classes[e][nearest].tolist()


def test_the_untrained_baseline_has_fresh_weights(blob_store: Store) -> None:
    one = learner(blob_store, ProtoNet())
    same, other = (untrained(one, blob_store, seed=seed) for seed in (0, 1))
    assert all(torch.equal(same.params[n], one.params[n]) for n in one.params)
    assert not all(torch.equal(other.params[n], one.params[n]) for n in one.params)
    assert caches_features(other)


def test_population_statistics_match_one_large_batch(blob_store: Store) -> None:
    """The first layer's input does not depend on batches: its moments are those of all examples."""
    one = learner(blob_store, ProtoNet())
    rows = np.arange(576)  # all 24 * 24 training rows: fewer than are asked for
    inputs = one.preprocessing(blob_store.gather(rows))
    _, together = one.model.with_statistics(None).features(one.params, inputs)
    measured = population_statistics(one, one.params, blob_store)
    for name in ("norms.0.mean", "norms.0.var"):
        torch.testing.assert_close(measured[name], together[name], rtol=1e-4, atol=1e-5)
    assert set(measured) == set(together)


def test_pictures_of_another_shape_are_refused(blob_store: Store, blob_tasks: Path) -> None:
    one = learner(blob_store, ProtoNet())
    other = one.preprocessing.model_copy(update={"image_shape": (3, 16, 16)})
    episodes = read_episodes(blob_tasks, "test")["3w1s"]
    with pytest.raises(ArtefactError, match="takes pictures of shape"):
        score(replace(one, preprocessing=other), blob_store, episodes)
