"""MAML's sine regressor: y = a sin(x + b) from ten points, by a network of two hidden layers.

K support points, Q query points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pipeline.algorithms.base import Adapted
from pipeline.algorithms.inner_loop import fast_weights, inner_loop_loss
from pipeline.core.functional import BatchNormMode, Model
from pipeline.core.types import Metrics, Params, Task

_SIZES = (1, 40, 40, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SineMAML:
    """MAML on a regression problem; it brings its own network and looks at no pictures.

    References:
        Finn et al., Model-Agnostic Meta-Learning, 2017, section 5.1, arXiv:1703.03400.
    """

    trainable: ClassVar[bool] = True
    embeds_each_example: ClassVar[bool] = False

    inner_lr: float = 0.01
    num_inner_steps: int = 1
    first_order: bool = False
    batch_norm: BatchNormMode = "transductive"

    def init(self, feature_dim: int, generator: Generator) -> Params:
        """Weights and biases, uniform within 1 / sqrt(inputs)."""
        params = {}
        for i, (a, b) in enumerate(pairwise(_SIZES)):
            for name, shape in ((f"layers.{i}.weight", (b, a)), (f"layers.{i}.bias", (b,))):
                params[name] = (2 * torch.rand(shape, generator=generator) - 1) * a**-0.5
        return params

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        """Mean squared error of the queries under the adapted weights."""
        return inner_loop_loss(self, model, params, task)

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Keep the adapted weights."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        fast = fast_weights(self, model, leaves, support_x, support_y, num_ways, first_order=True)
        return Adapted({n: p.detach() for n, p in fast.items()}, None)

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Values [Q, 1]."""
        return _network(adapted.tensors, query_x)

    def start(self, params: Params, num_ways: int) -> Params:
        """The meta-parameters themselves."""
        return dict(params)

    def step(self, params: Params, fast: Params, gradient: Params, index: int) -> Params:
        """phi_{k+1} = phi_k - lr dL(phi_k)/dphi_k."""
        return {n: value - self.inner_lr * gradient[n] for n, value in fast.items()}

    def support_loss(
        self, model: Model, params: Params, fast: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        """Mean squared error of the support points."""
        return F.mse_loss(_network(fast, x), y)

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[Tensor, Metrics]:
        """Mean squared error of the queries."""
        loss = F.mse_loss(_network(fast, task.query_x), task.query_y)
        return loss, {"loss": loss.detach()}


class PlainRegressor(nn.Module):
    """The same network as a plain module, for peers."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(_SIZES))
        first = next(iter(params.values()))
        self.to(device=first.device, dtype=first.dtype)
        self.load_state_dict({name: value.detach() for name, value in params.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Values [B, 1] of points [B, 1]."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < last else layer(x)
        return x


def sine_task(num_support: int, num_query: int, generator: Generator) -> Task:
    """Amplitude in [0.1, 5], phase in [0, pi], points in [-5, 5], as in the paper."""
    amplitude = 0.1 + 4.9 * torch.rand(1, generator=generator)
    phase = math.pi * torch.rand(1, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(count, 1, generator=generator) - 5
        return x, amplitude * torch.sin(x + phase)

    return Task(*draw(num_support), *draw(num_query), 1)


def _network(weights: Params, x: Tensor) -> Tensor:
    last = len(_SIZES) - 2
    for i in range(last):
        x = F.relu(F.linear(x, weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]))
    return F.linear(x, weights[f"layers.{last}.weight"], weights[f"layers.{last}.bias"])
