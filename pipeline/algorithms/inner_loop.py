"""Learners that adapt by gradient steps on the support set: what they are, and how they run.

The engine differentiates through these functions in more ways than one; all of them are pure.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.core.functional import Model
from pipeline.core.types import Metrics, Params, Task


@runtime_checkable
class InnerLoop(Protocol):
    """phi_0 = start(theta); phi_{k+1} = step(theta, phi_k, dL_support/dphi_k, k).

    `params` (theta) are the meta-parameters and `fast` (phi) what adaptation changes: copies of all
    of them, of some, or something else. Every function may depend on both.
    """

    @property
    def num_inner_steps(self) -> int:
        """K."""

    @property
    def first_order(self) -> bool:
        """Whether the inner gradients count as constants."""

    def start(self, params: Params, num_ways: int) -> Params:
        """Fast weights before the first step."""

    def step(self, params: Params, fast: Params, gradient: Params, index: int) -> Params:
        """Fast weights after step `index`; elementwise, so that it costs nothing."""

    def support_loss(
        self, model: Model, params: Params, fast: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        """Scalar loss on the support set."""

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[Tensor, Metrics]:
        """Scalar loss on the queries under the adapted weights, and detached metrics."""


def fast_weights(
    algorithm: InnerLoop,
    model: Model,
    params: Params,
    x: Tensor,
    y: Tensor,
    num_ways: int,
    *,
    first_order: bool,
) -> Params:
    """phi_K, differentiable in `params` through every step unless `first_order`.

    References:
        Finn et al., Model-Agnostic Meta-Learning, 2017, eq. 1 and section 5.2 (first order),
        arXiv:1703.03400.
    """
    fast = algorithm.start(params, num_ways)
    for index in range(algorithm.num_inner_steps):
        loss = algorithm.support_loss(model, params, fast, x, y)
        gradient = inner_gradient(loss, fast, create_graph=not first_order)
        fast = algorithm.step(params, fast, gradient, index)
    return fast


def inner_gradient(loss: Tensor, fast: Params, *, create_graph: bool) -> Params:
    """d loss / d fast; a loss [T] of T tasks at once gives the gradient of each."""
    gradients = torch.autograd.grad(
        loss.sum(), list(fast.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(fast, gradients, strict=True))


def inner_loop_loss(
    algorithm: InnerLoop,
    model: Model,
    params: Params,
    task: Task,
    *,
    query_model: Model | None = None,
) -> tuple[Tensor, Metrics]:
    """`Algorithm.task_loss` of a learner that adapts by gradient steps.

    Args:
        query_model: for the queries, where it is another one: of lower precision, say.
    """
    fast = fast_weights(
        algorithm,
        model,
        params,
        task.support_x,
        task.support_y,
        task.num_ways,
        first_order=algorithm.first_order,
    )
    return algorithm.query_loss(query_model or model, params, fast, task)
