"""The baseline that meta-learning has to beat: class means of fixed features, nothing learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from pydantic import ConfigDict
from torch import Generator, Tensor

from pipeline.algorithms.base import Adapted
from pipeline.algorithms.protonet import prototypes, squared_distances
from pipeline.core.functional import BatchNormMode, Model, accuracy
from pipeline.core.types import Metrics, Params, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestCentroid:
    """Nearest class mean of fixed features, optionally of unit length.

    References:
        Wang et al., SimpleShot, 2019, section 3.1 (UN and L2N; the features are not centred),
        arXiv:1911.04623.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    trainable: ClassVar[bool] = False
    embeds_each_example: ClassVar[bool] = True

    metric: Literal["cosine", "euclidean"] = "cosine"
    scale: Annotated[float, Gt(0)] = 10.0
    batch_norm: BatchNormMode = "running"

    def init(self, feature_dim: int, generator: Generator) -> Params:
        """None."""
        return {}

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the queries, to look at; training does not change this learner."""
        adapted = self.adapt(model, params, task.support_x, task.support_y, task.num_ways)
        logits_QN = self.predict(model, params, adapted, task.query_x)
        loss = F.cross_entropy(logits_QN, task.query_y)
        return loss, {"loss": loss.detach(), "accuracy": accuracy(logits_QN, task.query_y)}

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Keep the class means."""
        with torch.no_grad():
            features_SD, statistics = model.embed_support(params, support_x)
            means_ND = prototypes(self._shape(features_SD), support_y, num_ways)
            return Adapted({"prototypes": self._shape(means_ND)}, statistics)

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Negative scaled squared distances to the class means, [Q, N]."""
        with torch.no_grad():
            features_QD = self._shape(model.embed_query(params, query_x, adapted.statistics))
            return -self.scale * squared_distances(features_QD, adapted.tensors["prototypes"])

    def _shape(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.metric == "cosine" else features
