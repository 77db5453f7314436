"""Spoilt queries: the same pictures for every learner, clean support, equal shares of corruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pipeline.evaluation.robustness import Robustness, RobustnessConfig, SpoiltStore, score_spoilt
from pipeline.evaluation.scoring import score
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes
from tests.unit.test_scoring import learner

CONFIG = RobustnessConfig(num_episodes=10, seed=3)
NAMES = list(CORRUPTIONS)


@pytest.fixture
def episodes(blob_tasks: Path) -> FrozenEpisodes:
    return read_episodes(blob_tasks, "test")["5w2s"]


def spoilt(store: Store, episodes: FrozenEpisodes, algorithm: ProtoNet | MAML) -> Robustness:
    one = learner(store, algorithm)
    return score_spoilt(one, store, episodes, score(one, store, episodes), CONFIG)


@pytest.mark.parametrize("algorithm", [ProtoNet(), MAML(num_inner_steps=1)])
def test_answers_are_those_to_spoilt_queries_after_clean_support(
    blob_store: Store, episodes: FrozenEpisodes, algorithm: ProtoNet | MAML
) -> None:
    """Written anew with `adapt` and `predict`, picture by picture."""
    found = spoilt(blob_store, episodes, algorithm)
    one = learner(blob_store, algorithm)
    for e, severity in ((0, 1), (7, 3)):
        rows = episodes.query_rows[e]
        pictures = [
            corrupt(
                blob_store.gather(rows[q : q + 1]),
                rows[q : q + 1],
                name=NAMES[found.corruption[e, q]],
                severity=severity,
                seed=3,
            )
            for q in range(len(rows))
        ]
        labels = np.asarray(episodes.support_labels[e], np.int64)
        support = blob_store.gather(episodes.support_rows[e])
        adapted = one.adapt(support, torch.as_tensor(labels), 5)
        best = one.predict(adapted, np.concatenate(pictures)).argmax(dim=1).numpy()
        expected = episodes.classes[e][best]
        assert found.spoilt[severity].predicted_class[e].tolist() == expected.tolist()


def test_the_clean_answers_are_those_of_the_same_episodes(
    blob_store: Store, episodes: FrozenEpisodes
) -> None:
    found = spoilt(blob_store, episodes, ProtoNet())
    whole = score(learner(blob_store, ProtoNet()), blob_store, episodes)
    np.testing.assert_array_equal(found.clean.predicted_class, whole.predicted_class[:10])
    assert list(found.spoilt) == list(SEVERITIES)
    for severity, scores in found.spoilt.items():
        np.testing.assert_array_equal(scores.query_class, found.clean.query_class)
        lost = found.clean.correct.mean() - scores.correct.mean()
        assert found.drop(severity) == pytest.approx(float(lost), abs=1e-12)


def test_every_corruption_has_an_equal_share(blob_store: Store, episodes: FrozenEpisodes) -> None:
    found = spoilt(blob_store, episodes, ProtoNet())
    shares = np.bincount(found.corruption.ravel(), minlength=len(NAMES))
    assert shares.tolist() == [found.corruption.size // len(NAMES)] * len(NAMES)
    told = found.as_json()
    assert (told["setting"], told["episodes"]) == ("5w2s", 10)
    for severity in SEVERITIES:
        one = told["severities"][str(severity)]
        assert set(one["corruptions"]) == set(NAMES)
        mean = np.mean(list(one["corruptions"].values()))
        assert one["accuracy"] == pytest.approx(float(mean), abs=1e-4)
        assert one["accuracy"] == pytest.approx(found.accuracy(severity), abs=1e-4)


def test_the_same_seed_spoils_the_same(blob_store: Store, episodes: FrozenEpisodes) -> None:
    first, again = (spoilt(blob_store, episodes, ProtoNet()) for _ in range(2))
    for severity in SEVERITIES:
        np.testing.assert_array_equal(
            first.spoilt[severity].confidence, again.spoilt[severity].confidence
        )


def test_a_spoilt_store_holds_the_clean_pictures_and_their_twins(blob_store: Store) -> None:
    rows = np.array([5, 900, 5, 17])
    twins = np.array([0, 2, 3, 5])
    seen = SpoiltStore(blob_store, 2, 9).gather(rows + twins * blob_store.num_rows)
    clean = blob_store.gather(rows)
    np.testing.assert_array_equal(seen[0], clean[0])
    for i in (1, 2, 3):
        name = NAMES[twins[i] - 1]
        alone = corrupt(clean[i : i + 1], rows[i : i + 1], name=name, severity=2, seed=9)
        np.testing.assert_array_equal(seen[i], alone[0])
        assert not np.array_equal(seen[i], clean[i])
    np.testing.assert_array_equal(blob_store.gather(rows), clean)
