"""Model-agnostic meta-learning, second and first order.

B examples, S support examples, Q query examples, N ways, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from pydantic import ConfigDict
from torch import Generator, Tensor

from pipeline.algorithms.base import Adapted
from pipeline.algorithms.inner_loop import fast_weights, inner_loop_loss
from pipeline.core.functional import BatchNormMode, Model, accuracy
from pipeline.core.types import Metrics, Params, Statistics, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class MAML:
    """Learn an initialisation from which a few gradient steps on the support set suffice.

    The classifier starts every class from one learned vector, so that any number of ways, in any
    order, is the same problem.

    References:
        Finn et al., 2017, algorithm 2, arXiv:1703.03400. Deviation: the shared class vector of
        Ye and Chao, How to Train Your MAML to Excel in Few-Shot Classification, 2022, section 6,
        arXiv:2106.16245.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    trainable: ClassVar[bool] = True
    embeds_each_example: ClassVar[bool] = False

    inner_lr: Annotated[float, Gt(0)] = 0.1
    num_inner_steps: Annotated[int, Ge(1)] = 3
    first_order: bool = False
    batch_norm: BatchNormMode = "inductive_support"

    def init(self, feature_dim: int, generator: Generator) -> Params:
        """The vector and bias from which every class of the classifier starts."""
        scale = feature_dim**-0.5
        weight = torch.randn(1, feature_dim, generator=generator) * scale
        return {"head.weight": weight, "head.bias": torch.zeros(1)}

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the queries under the adapted weights."""
        return inner_loop_loss(self, model, params, task)

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Keep the adapted weights."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        with torch.enable_grad():
            fast = fast_weights(
                self, model, leaves, support_x, support_y, num_ways, first_order=True
            )
        fast = {n: p.detach() for n, p in fast.items()}
        with torch.no_grad():
            return Adapted(fast, self._query_statistics(model, fast, support_x))

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """The adapted classifier's logits, [Q, N]."""
        with torch.no_grad():
            features_QD = model.embed_query(adapted.tensors, query_x, adapted.statistics)
            return _classify(adapted.tensors, features_QD)

    def start(self, params: Params, num_ways: int) -> Params:
        """The meta-parameters, with one copy of the class vector for every class."""
        weight, bias = params["head.weight"], params["head.bias"]
        return {
            **params,
            "head.weight": weight.expand(num_ways, -1),
            "head.bias": bias.expand(num_ways),
        }

    def step(self, params: Params, fast: Params, gradient: Params, index: int) -> Params:
        """phi_{k+1} = phi_k - lr dL(phi_k)/dphi_k."""
        lr = self.inner_lr
        return {n: torch.sub(value, gradient[n], alpha=lr) for n, value in fast.items()}

    def support_loss(
        self, model: Model, params: Params, fast: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        """Mean cross-entropy of the support set."""
        features_SD, _ = model.embed_support(fast, x)
        return F.cross_entropy(_classify(fast, features_SD), y)

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the queries."""
        statistics = self._query_statistics(model, fast, task.support_x)
        logits_QN = _classify(fast, model.embed_query(fast, task.query_x, statistics))
        loss = F.cross_entropy(logits_QN, task.query_y)
        return loss, {"loss": loss.detach(), "accuracy": accuracy(logits_QN, task.query_y)}

    def _query_statistics(self, model: Model, fast: Params, support_x: Tensor) -> Statistics | None:
        """Statistics for the queries; only support statistics have to be taken anew."""
        if model.batch_norm == "inductive_support":
            return model.embed_support(fast, support_x)[1]
        return model.statistics if model.batch_norm == "running" else None


def _classify(fast: Params, features_BD: Tensor) -> Tensor:
    return F.linear(features_BD, fast["head.weight"], fast["head.bias"])
