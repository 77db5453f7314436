"""Prototypical networks.

S support examples, Q query examples, N ways, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from pydantic import ConfigDict
from torch import Generator, Tensor

from pipeline.algorithms.base import Adapted
from pipeline.core.functional import BatchNormMode, Model, accuracy
from pipeline.core.types import Metrics, Params, Task


def prototypes(features_SD: Tensor, labels_S: Tensor, num_ways: int) -> Tensor:
    """Mean support feature of every class [N, D], c_n = (1/|S_n|) sum_{i in S_n} f(x_i).

    Args:
        labels_S: class of each row, in [0, num_ways); every class must occur.

    References:
        Snell et al., Prototypical Networks for Few-shot Learning, 2017, eq. 1, arXiv:1703.05175.
    """
    ways_N1 = torch.arange(num_ways, device=labels_S.device)[:, None]
    members_NS = (labels_S == ways_N1).to(features_SD.dtype)
    return members_NS @ features_SD / members_NS.sum(1, keepdim=True)


def squared_distances(a_QD: Tensor, b_ND: Tensor) -> Tensor:
    """Squared Euclidean distance of every pair, [Q, N], without a [Q, N, D] intermediate."""
    squares_QN = (a_QD**2).sum(1, keepdim=True) + (b_ND**2).sum(1)
    return squares_QN - 2 * a_QD @ b_ND.T


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtoNet:
    """Classify by the nearest class mean in feature space: p(n | x) ~ exp(-scale d(f(x), c_n)).

    References:
        Snell et al., 2017, eq. 2 with the squared Euclidean distance; `scale` is Oreshkin et al.,
        TADAM, 2018, eq. 2, arXiv:1805.10123, held fixed.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    trainable: ClassVar[bool] = True
    embeds_each_example: ClassVar[bool] = True

    scale: Annotated[float, Gt(0)] = 1.0
    batch_norm: BatchNormMode = "running"

    def init(self, feature_dim: int, generator: Generator) -> Params:
        """None: the backbone is all there is to learn."""
        return {}

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the queries."""
        support_SD, query_QD = model.embed_task(params, task.support_x, task.query_x)
        centres_ND = prototypes(support_SD, task.support_y, task.num_ways)
        logits_QN = -self.scale * squared_distances(query_QD, centres_ND)
        loss = F.cross_entropy(logits_QN, task.query_y)
        return loss, {"loss": loss.detach(), "accuracy": accuracy(logits_QN, task.query_y)}

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Keep the class means."""
        with torch.no_grad():
            features_SD, statistics = model.embed_support(params, support_x)
            return Adapted({"prototypes": prototypes(features_SD, support_y, num_ways)}, statistics)

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Negative scaled squared distances to the class means, [Q, N]."""
        with torch.no_grad():
            features_QD = model.embed_query(params, query_x, adapted.statistics)
            return -self.scale * squared_distances(features_QD, adapted.tensors["prototypes"])
