"""The temperature is the best one, comes from validation episodes, and moves no answer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.algorithms.protonet import ProtoNet
from pipeline.core.errors import ArtefactError
from pipeline.evaluation.scoring import query_logits, score
from pipeline.evaluation.statistics import calibration
from pipeline.evaluation.temperature import (
    HIGHEST,
    LOWEST,
    LabelledLogits,
    fit_calibration,
    fit_temperature,
    negative_log_likelihood,
    slope,
)
from pipeline.store.reader import Store
from pipeline.tasks.frozen import read_episodes
from tests.unit.test_scoring import learner


def favourite(gap: float, num_ways: int, right: int, total: int) -> LabelledLogits:
    """Every query has logits (gap, 0, ..., 0); `right` of `total` are of the first class."""
    logits = np.zeros((total, num_ways))
    logits[:, 0] = gap
    return logits, np.where(np.arange(total) < right, 0, 1).astype(np.int64)


def drawn(seed: int, num_ways: int, true_temperature: float, n: int = 400) -> LabelledLogits:
    """Labels drawn from softmax(z / T): T is the temperature to be found, up to luck."""
    rng = np.random.default_rng(seed)
    logits = 4 * rng.standard_normal((n, num_ways))
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / true_temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("num_ways", [2, 5, 20])
@pytest.mark.parametrize(("gap", "right"), [(3.0, 60), (3.0, 95), (0.5, 80), (9.0, 70)])
def test_a_favourite_gets_the_share_that_it_earned(num_ways: int, gap: float, right: int) -> None:
    """exp(g/T) / (exp(g/T) + N - 1) = q gives T = g / log(q (N - 1) / (1 - q))."""
    share = right / 100
    expected = gap / math.log(share * (num_ways - 1) / (1 - share))
    found = fit_temperature([favourite(gap, num_ways, right, 100)])
    assert found == pytest.approx(expected, abs=5e-5)


@given(seed=st.integers(0, 10_000), num_ways=st.integers(2, 9), temperature=st.floats(0.3, 5))
def test_no_other_temperature_is_better(seed: int, num_ways: int, temperature: float) -> None:
    one = drawn(seed, num_ways, temperature)
    found = fit_temperature([one])
    others = np.geomspace(LOWEST, HIGHEST, 200)
    best = min(negative_log_likelihood(one, float(other)) for other in others)
    assert negative_log_likelihood(one, found) <= best + 1e-9


@given(seed=st.integers(0, 10_000), inverse=st.floats(0.1, 3))
def test_the_slope_is_the_derivative_and_rises(seed: int, inverse: float) -> None:
    one, step = drawn(seed, 4, 1.0), 1e-5
    ends = [negative_log_likelihood(one, 1 / (inverse + side)) for side in (step, -step)]
    assert slope(one, inverse) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)
    assert slope(one, inverse) <= slope(one, inverse * 1.1)


def test_every_set_weighs_the_same_however_large() -> None:
    few, many = favourite(3.0, 5, 60, 100), favourite(3.0, 5, 90, 100)
    repeated = (np.tile(many[0], (50, 1)), np.tile(many[1], 50))
    assert fit_temperature([few, repeated]) == fit_temperature([few, many])
    assert fit_temperature([few, many]) != fit_temperature([few])
    share = (0.6 + 0.6 + 0.9) / 3  # with one gap, the mean of the slopes is that of their shares
    expected = 3.0 / math.log(share * 4 / (1 - share))
    assert fit_temperature([few, few, repeated]) == pytest.approx(expected, abs=5e-5)


def test_a_learner_that_is_always_right_or_not_finite_has_a_temperature_too() -> None:
    assert fit_temperature([favourite(0.1, 5, 100, 100)]) == pytest.approx(LOWEST, abs=1e-4)
    assert fit_temperature([favourite(-0.1, 5, 100, 100)]) == pytest.approx(HIGHEST, rel=1e-4)
    broken, labels = favourite(3.0, 5, 60, 100)
    broken[3, 2] = np.nan
    assert fit_temperature([(broken, labels)]) == 1.0


def test_it_is_fitted_on_validation_episodes_alone(blob_store: Store, blob_tasks: Path) -> None:
    one = learner(blob_store, ProtoNet(scale=0.2))
    val = read_episodes(blob_tasks, "val")
    fit = fit_calibration(one, blob_store, val)
    assert (fit.split, fit.episodes) == ("val", {name: e.digest for name, e in val.items()})
    assert fit.ece_before is not None and fit.ece_after is not None
    assert fit.ece_after < fit.ece_before
    assert fit == fit_calibration(one, blob_store, val)
    with pytest.raises(ArtefactError, match="not on those of test"):
        fit_calibration(one, blob_store, read_episodes(blob_tasks, "test"))


def test_a_scale_of_the_logits_comes_back_as_temperature(
    blob_store: Store, blob_tasks: Path
) -> None:
    val = read_episodes(blob_tasks, "val")
    plain, scaled = (
        fit_calibration(learner(blob_store, ProtoNet(scale=scale)), blob_store, val).temperature
        for scale in (0.05, 0.1)
    )
    assert scaled == pytest.approx(2 * plain, rel=1e-3)


def test_scores_with_a_temperature_have_other_confidences_and_the_same_answers(
    blob_store: Store, blob_tasks: Path
) -> None:
    one = learner(blob_store, ProtoNet())
    episodes = read_episodes(blob_tasks, "test")["5w2s"]
    logits = query_logits(one, blob_store, {"it": episodes})["it"]
    plain = score(one, blob_store, episodes)
    for temperature in (0.5, 1.0, 3.0):
        scaled = score(one, blob_store, episodes, temperature=temperature)
        powers = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
        np.testing.assert_allclose(scaled.confidence, 1 / powers.sum(-1), rtol=1e-4)
        np.testing.assert_array_equal(scaled.predicted_class, plain.predicted_class)
    flat = score(one, blob_store, episodes, temperature=1e6)
    assert calibration(flat.confidence, flat.correct).error == pytest.approx(
        abs(float(flat.correct.mean()) - 0.2), abs=1e-4
    )
