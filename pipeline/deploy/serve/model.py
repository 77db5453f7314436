"""A loaded version: learns support sets and answers queries, with the same bits in any company.

S support examples, Q query examples, N ways, D features, P rows of a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.base import Adapted
from pipeline.core.types import Statistics
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.serve.messages import InputForm, ModelRef, VersionTold
from pipeline.engine.features import caches_features, feature_head
from pipeline.engine.learner import Learner

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Ready:
    """A support set that a version has learned."""

    adapted: Adapted
    support: Tensor
    """[S, D] features of unit length, for the explanation."""
    statistics: Statistics | None
    """With which queries are embedded for the explanation."""
    unknown_below: float | None


@dataclass(frozen=True)
class Answers:
    """Of all queries of one request."""

    probabilities: Tensor
    """[Q, N]"""
    similarity: Tensor
    """[Q, S] cosines of the features"""


@dataclass(frozen=True)
class Version:
    """One model version, ready to serve; all learners share its weights, which nothing changes."""

    ref: ModelRef
    bundle: Bundle
    rows_per_pass: int
    _own: threading.local = field(
        default_factory=threading.local, init=False, repr=False, compare=False
    )

    @property
    def learner(self) -> Learner:
        """The meta-trained learner, for this thread alone; the weights are those of all.

        While a network runs, its skeleton holds the tensors of that call (torch's
        `functional_call` puts them in and takes them out), so no two threads may share one. The
        bundle's own is only copied from.
        """
        if not hasattr(self._own, "learner"):
            shared = self.bundle.learner
            model = replace(shared.model, skeleton=deepcopy(shared.model.skeleton))
            self._own.learner = replace(shared, model=model)
        learner: Learner = self._own.learner
        return learner

    @property
    def embeds_alone(self) -> bool:
        """Whether a picture's features do not depend on its episode: then requests share passes."""
        return caches_features(self.learner)

    def embed(self, pictures: Pictures, statistics: Statistics | None = None) -> Tensor:
        """Features [B, D] of uint8 pictures [B, C, H, W], in passes of P rows each.

        A pass is filled up with its first picture, so that it always has the same shape and a row's
        bits depend on that row alone.
        """
        model, params = self.learner.model, self.learner.params
        statistics = model.statistics if self.embeds_alone else statistics
        parts = []
        for start in range(0, len(pictures), self.rows_per_pass):
            rows = pictures[start : start + self.rows_per_pass]
            filling = np.broadcast_to(rows[:1], (self.rows_per_pass - len(rows), *rows.shape[1:]))
            inputs = self.learner.preprocessing(np.concatenate([rows, filling]))
            parts.append(model.embed_query(params, inputs, statistics)[: len(rows)])
        return torch.cat(parts)

    def learn(
        self,
        pictures: Pictures,
        labels: Sequence[int],
        num_ways: int,
        features: Tensor | None = None,
    ) -> Ready:
        """Learn N classes from pictures [S, C, H, W] with labels [S] in [0, N).

        Args:
            features: of these pictures, where a pass that others shared has them.
        """
        targets = torch.as_tensor(labels)
        learner = self.learner
        with torch.no_grad():
            if self.embeds_alone:
                features = self.embed(pictures) if features is None else features
                statistics = learner.model.statistics
                head, own = feature_head(learner)
                adapted = learner.algorithm.adapt(head, own, features, targets, num_ways)
            else:
                inputs = learner.preprocessing(pictures)
                features, statistics = learner.model.embed_support(learner.params, inputs)
                adapted = learner.adapt(pictures, targets, num_ways)
            unit_SD = F.normalize(features, dim=-1)
            return Ready(adapted, unit_SD, statistics, unknown_threshold(unit_SD, targets))

    def answer(self, ready: Ready, pictures: Pictures, features: Tensor | None = None) -> Answers:
        """Class probabilities and similarities of pictures [Q, C, H, W].

        Args:
            features: as for `learn`.
        """
        learner = self.learner
        with torch.no_grad():
            if self.embeds_alone:
                features = self.embed(pictures) if features is None else features
                head, own = feature_head(learner)
                logits = learner.algorithm.predict(head, own, ready.adapted, features)
            else:
                inputs = learner.preprocessing(pictures)
                logits = learner.algorithm.predict(
                    learner.model, learner.params, ready.adapted, inputs
                )
                features = self.embed(pictures, ready.statistics)
            scaled = logits.float() / self.bundle.temperature
            similarity = F.normalize(features, dim=-1) @ ready.support.T
            return Answers(F.softmax(scaled, dim=-1), similarity)

    def told(self) -> VersionTold:
        """For `GET /v1/model`."""
        channels, height, width = self.learner.preprocessing.image_shape
        shown = ("accuracy", "ci95", "episodes", "ece")
        return VersionTold(
            **self.ref.model_dump(),
            algorithm=self.learner.name,
            input=InputForm(channels=channels, height=height, width=width),
            evaluation={
                setting: {key: numbers[key] for key in shown if key in numbers}
                for setting, numbers in self.bundle.evaluation.items()
            },
        )


def unknown_threshold(unit_SD: Tensor, labels_S: Tensor) -> float | None:
    """The similarity to the nearest example below which a query belongs to no class.

    Every example is taken for a query in turn. Its nearest other example of its own class shows how
    alike a known query would be, its nearest example of another class how alike an unknown one. The
    threshold is the one that tells these apart best (most of the first at or above it, most of the
    second below; of several the lowest, which refuses least). Where no class has two examples, only
    strangers are known: it is their median.
    """
    similar = unit_SD @ unit_SD.T
    same = labels_S[:, None] == labels_S[None, :]
    itself = torch.eye(len(labels_S), dtype=torch.bool)
    own = similar.masked_fill(~same | itself, -torch.inf).max(dim=1).values
    other = similar.masked_fill(same, -torch.inf).max(dim=1).values
    own = own[own > -torch.inf]
    if not len(own):
        return float(other.median())
    candidates = torch.cat([own, other]).sort().values
    known = (own[None, :] >= candidates[:, None]).float().mean(dim=1)
    strange = (other[None, :] < candidates[:, None]).float().mean(dim=1)
    return float(candidates[int((known + strange).argmax())])
