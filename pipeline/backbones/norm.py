"""Batch normalisation whose statistics are arguments and results, never hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.types import Statistics

EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Normalise each channel of [B, C] or [B, C, H, W] inputs.

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1, arXiv:1502.03167.
        The variance is the biased one in training and in evaluation.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, statistics: Statistics | None, collected: Statistics, keep: bool
    ) -> Tensor:
        """Normalise by given statistics, or by the batch's own, which go into `collected`."""
        if statistics is not None:
            mean, var = statistics[f"{self.name}.mean"], statistics[f"{self.name}.var"]
            if mean.requires_grad:  # PyTorch's own takes given statistics for constants
                return self._affine(x, mean, var)
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, EPSILON)
        if keep:
            dims = [d for d in range(x.ndim) if d != 1]
            var, mean = torch.var_mean(x, dim=dims, correction=0)
            result = self._affine(x, mean, var)
        else:
            result, mean, inverse = torch.native_batch_norm(
                x, self.weight, self.bias, None, None, True, 0.0, EPSILON
            )
            mean, var = mean.detach(), inverse.detach() ** -2 - EPSILON
        collected[f"{self.name}.mean"], collected[f"{self.name}.var"] = mean, var
        return result

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(var + EPSILON)
        shape = [1, -1] + [1] * (x.ndim - 2)
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)
