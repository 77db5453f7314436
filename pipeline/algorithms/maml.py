"""Model-agnostic meta-learning, second and first order.

S support examples, Q query examples, N ways, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from pydantic import ConfigDict
from torch import Generator, Tensor

from pipeline.algorithms.base import Adapted
from pipeline.core.functional import BatchNormMode, Model, accuracy
from pipeline.core.types import Metrics, Params, Task


def inner_sgd(
    loss: Callable[[Params], Tensor],
    params: Params,
    *,
    lr: float,
    num_steps: int,
    first_order: bool,
) -> Params:
    """Gradient steps on a support loss, phi_{k+1} = phi_k - lr dL(phi_k)/dphi_k.

    The result is differentiable in `params` through every step; with `first_order`, the steps'
    gradients count as constants.

    References:
        Finn et al., Model-Agnostic Meta-Learning, 2017, eq. 1 and section 5.2 (first order),
        arXiv:1703.03400.
    """
    fast = params
    for _ in range(num_steps):
        names, values = list(fast), list(fast.values())
        gradients = torch.autograd.grad(loss(fast), values, create_graph=not first_order)
        fast = {n: v - lr * g for n, v, g in zip(names, values, gradients, strict=True)}
    return fast


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

    __pydantic_config__ = ConfigDict(extra="forbid")
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
        fast = self._fast_weights(
            model, params, task.support_x, task.support_y, task.num_ways, self.first_order
        )
        statistics = self._query_statistics(model, fast, task.support_x)
        features_QD = model.embed_query(fast, task.query_x, statistics)
        logits_QN = F.linear(features_QD, fast["head.weight"], fast["head.bias"])
        loss = F.cross_entropy(logits_QN, task.query_y)
        return loss, {"loss": loss.detach(), "accuracy": accuracy(logits_QN, task.query_y)}

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Keep the adapted weights."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        with torch.enable_grad():
            fast = self._fast_weights(model, leaves, support_x, support_y, num_ways, True)
        fast = {n: p.detach() for n, p in fast.items()}
        with torch.no_grad():
            return Adapted(fast, self._query_statistics(model, fast, support_x))

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """The adapted classifier's logits, [Q, N]."""
        fast = adapted.tensors
        with torch.no_grad():
            features_QD = model.embed_query(fast, query_x, adapted.statistics)
            return F.linear(features_QD, fast["head.weight"], fast["head.bias"])

    def _fast_weights(
        self, model: Model, params: Params, x: Tensor, y: Tensor, num_ways: int, first_order: bool
    ) -> Params:
        def support_loss(fast: Params) -> Tensor:
            features_SD, _ = model.embed_support(fast, x)
            return F.cross_entropy(F.linear(features_SD, fast["head.weight"], fast["head.bias"]), y)

        start = {
            **params,
            "head.weight": params["head.weight"].expand(num_ways, -1),
            "head.bias": params["head.bias"].expand(num_ways),
        }
        return inner_sgd(
            support_loss,
            start,
            lr=self.inner_lr,
            num_steps=self.num_inner_steps,
            first_order=first_order,
        )

    def _query_statistics(
        self, model: Model, fast: Params, support_x: Tensor
    ) -> dict[str, Tensor] | None:
        """Statistics for the queries; only support statistics have to be taken anew."""
        if model.batch_norm == "inductive_support":
            return model.embed_support(fast, support_x)[1]
        return model.statistics if model.batch_norm == "running" else None
