"""Adam on one flat vector, so that its state is two tensors that a checkpoint can hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Moments(NamedTuple):
    """Running means of the gradient and of its square, [V] each."""

    first: Tensor
    second: Tensor


def zero_moments(vector: Tensor) -> Moments:
    """The state before the first step."""
    return Moments(torch.zeros_like(vector), torch.zeros_like(vector))


def adam_step(
    vector: Tensor, gradient: Tensor, moments: Moments, *, step: int, lr: float, weight_decay: float
) -> tuple[Tensor, Moments]:
    """One step with bias correction and decoupled weight decay; nothing is changed in place.

    Args:
        step: number of this step, the first being 1.

    References:
        Kingma and Ba, Adam, 2015, algorithm 1, arXiv:1412.6980; Loshchilov and Hutter, Decoupled
        Weight Decay Regularization, 2019, algorithm 2, arXiv:1711.05101.
    """
    first = _BETA1 * moments.first + (1 - _BETA1) * gradient
    second = _BETA2 * moments.second + (1 - _BETA2) * gradient**2
    rate = lr / (1 - _BETA1**step)
    denominator = (second / (1 - _BETA2**step)).sqrt() + _EPSILON
    updated = vector * (1 - lr * weight_decay) - rate * first / denominator
    return updated, Moments(first, second)
