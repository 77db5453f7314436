"""Temperature scaling: one number, fitted on validation episodes, that makes confidences honest.

E episodes, Q queries, N ways, n queries of all episodes of a set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ArtefactError
from pipeline.core.files import canonical_json, sha256_bytes
from pipeline.engine.learner import Learner
from pipeline.evaluation.scoring import query_logits
from pipeline.evaluation.statistics import calibration
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes

Floats: TypeAlias = npt.NDArray[np.float64]
LabelledLogits: TypeAlias = tuple[Floats, npt.NDArray[np.int64]]
"""Logits [n, N] and labels [n] of one set of episodes."""

LOWEST, HIGHEST = 0.01, 100.0
"""A learner that is always right, or never, has no best temperature: it gets an end of this."""
_HALVINGS = 44
_DIGITS = 4


@dataclass(frozen=True)
class CalibrationFit:
    """A temperature, with what it was fitted on and what it does there."""

    temperature: float
    split: str
    episodes_digest: str
    """SHA-256 over the digests of all sets, in `episodes`."""
    episodes: Mapping[str, str]
    """Digest by setting."""
    ece_before: float | None
    """Expected calibration error on these episodes, mean over the settings; None: not finite."""
    ece_after: float | None

    def as_json(self) -> dict[str, Any]:
        """For the bundle's evidence."""
        return asdict(self)


def fit_calibration(
    learner: Learner, store: Store, episodes: Mapping[str, FrozenEpisodes]
) -> CalibrationFit:
    """Fit a learner's temperature on frozen validation episodes.

    One temperature serves every number of ways and shots, so every set weighs the same.

    Raises:
        ArtefactError: these are test episodes, which must not shape what they judge.
    """
    if wrong := sorted({one.split for one in episodes.values()} - {"val"}):
        raise ArtefactError(
            f"a temperature is fitted on validation episodes, not on those of {', '.join(wrong)}. "
            "Read the split 'val'."
        )
    logits = query_logits(learner, store, episodes)
    sets = [_labelled(logits[name], one) for name, one in episodes.items()]
    temperature = fit_temperature(sets)
    digests = {name: one.digest for name, one in episodes.items()}
    return CalibrationFit(
        temperature=temperature,
        split="val",
        episodes_digest=sha256_bytes(canonical_json(digests).encode()),
        episodes=digests,
        ece_before=_mean_error(sets, 1.0),
        ece_after=_mean_error(sets, temperature),
    )


def fit_temperature(sets: Sequence[LabelledLogits]) -> float:
    """The temperature T that minimises the mean over sets of the mean negative log-likelihood.

    With b = 1/T and logits z, a query of class y costs log Σ_k exp(b z_k) - b z_y. Its second
    derivative by b is the variance of z under softmax(b z), never negative: the mean is convex,
    and its minimum is the root of the first derivative, E[z] - z_y, found by bisection of log b.
    Rounded to four decimals; 1 where a logit is not finite.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2, arXiv:1706.04599.
    """
    if not all(np.isfinite(logits).all() for logits, _ in sets):
        return 1.0
    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.mean([slope(one, math.exp(middle)) for one in sets]) < 0:
            low = middle
        else:
            high = middle
    return round(math.exp(-(low + high) / 2), _DIGITS)


def negative_log_likelihood(labelled: LabelledLogits, temperature: float) -> float:
    """Mean of log Σ_k exp(z_k / T) - z_y / T over the queries."""
    logits_nN, labels_n = labelled
    scaled = logits_nN / temperature
    top = scaled.max(axis=1, keepdims=True)
    total = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
    return float((total - scaled[np.arange(len(scaled)), labels_n]).mean())


def slope(labelled: LabelledLogits, inverse: float) -> float:
    """Derivative of the mean negative log-likelihood by b = 1/T: the mean of E[z] - z_y."""
    logits_nN, labels_n = labelled
    expected = (_softmax(logits_nN * inverse) * logits_nN).sum(axis=1)
    return float((expected - logits_nN[np.arange(len(logits_nN)), labels_n]).mean())


def _labelled(logits_EQN: Floats, episodes: FrozenEpisodes) -> LabelledLogits:
    labels_n = episodes.query_labels.astype(np.int64).ravel()
    return logits_EQN.reshape(len(labels_n), -1), labels_n


def _mean_error(sets: Sequence[LabelledLogits], temperature: float) -> float | None:
    errors = []
    for logits_nN, labels_n in sets:
        probabilities_nN = _softmax(logits_nN / temperature)
        right = probabilities_nN.argmax(axis=1) == labels_n
        errors.append(calibration(probabilities_nN.max(axis=1), right).error)
    mean = float(np.mean(errors))
    return round(mean, _DIGITS) if math.isfinite(mean) else None


def _softmax(logits_nN: Floats) -> Floats:
    powers = np.exp(logits_nN - logits_nN.max(axis=1, keepdims=True))
    scaled: Floats = powers / powers.sum(axis=1, keepdims=True)
    return scaled
