"""An episode that anybody can make up again, with the answers that a learner has for it.

They travel in the bundle. Whoever loads it must find them once more: other code, other libraries or
another machine may answer otherwise without any file being altered. S support, Q query examples.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import Section
from pipeline.engine.learner import Learner

WAYS, SHOTS = 2, 3
TOLERANCE = 1e-3
"""Of probabilities and cosines: far more than float32 loses, far less than a mistake costs."""
_DIGITS = 6


class Golden(Section):
    """A learner's answers to the made-up episode, in float64: the same from every machine."""

    probabilities: list[list[float]]
    """[Q, N]"""
    similarity: list[list[float]] | None
    """[Q, S] cosines of the features; None where features depend on the queries' batch."""


class Episode(NamedTuple):
    """Pictures of N classes of noise, each a picture that is disturbed a little."""

    support: npt.NDArray[np.uint8]
    labels: list[int]
    query: npt.NDArray[np.uint8]
    """One of each class, which any network tells apart that can tell anything apart; then one half
    way between the first two."""


def made_up_episode(image_shape: tuple[int, int, int]) -> Episode:
    """The same one everywhere, and with every version of NumPy: out of a hash."""
    bases = _bytes("bases", (WAYS, 1, *image_shape))
    noise = _bytes("noise", (WAYS, SHOTS + 1, *image_shape)) % 17 - 8
    pictures = np.clip(bases + noise, 0, 255).astype(np.uint8)
    between = ((bases[0] + bases[1]) // 2).astype(np.uint8)
    return Episode(
        support=pictures[:, :-1].reshape(-1, *image_shape),
        labels=[way for way in range(WAYS) for _ in range(SHOTS)],
        query=np.concatenate([pictures[:, -1], between]),
    )


def golden_of(learner: Learner, temperature: float) -> Golden:
    """What a learner answers, computed by its definition and not by the service.

    Args:
        temperature: what logits are divided by.
    """
    statistics = learner.model.statistics
    own = {n: s.double() for n, s in statistics.items()} if statistics is not None else None
    model = learner.model.with_statistics(own)
    params = {name: value.double() for name, value in learner.params.items()}
    model = replace(model, precision="fp32")
    episode = made_up_episode(learner.preprocessing.image_shape)
    support, query = (learner.preprocessing(p).double() for p in (episode.support, episode.query))
    with torch.no_grad():
        support_SD, given = model.embed_support(params, support)
        query_QD = model.embed_query(params, query, given)
        cosines = F.normalize(query_QD, dim=-1) @ F.normalize(support_SD, dim=-1).T
        labels = torch.tensor(episode.labels)
        adapted = learner.algorithm.adapt(model, params, support, labels, WAYS)
        logits = learner.algorithm.predict(model, params, adapted, query)
    return Golden(
        probabilities=_rounded(F.softmax(logits.double() / temperature, dim=-1)),
        similarity=None if given is None else _rounded(cosines),
    )


def difference(golden: Golden, probabilities: Tensor, similarity: Tensor) -> float:
    """The largest one between a golden episode and answers [Q, N] and [Q, S]; NaN is infinite."""
    pairs = [(golden.probabilities, probabilities)]
    if golden.similarity is not None:
        pairs.append((golden.similarity, similarity))
    found = [(torch.tensor(one, dtype=torch.float64) - other).abs().max() for one, other in pairs]
    most = float(torch.stack(found).max())
    return most if most == most else float("inf")


def _bytes(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    content = hashlib.shake_256(name.encode()).digest(math.prod(shape))
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).astype(np.int64)


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in row] for row in values.tolist()]
