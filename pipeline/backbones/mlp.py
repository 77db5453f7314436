"""A plain network of fully connected layers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch.nn.functional as F
from annotated_types import MinLen
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.backbones.norm import BatchNorm
from pipeline.core.config import Section
from pipeline.core.types import Statistics


class MLPConfig(Section):
    """MLP: fully connected layers with batch norm and ReLU on the flattened picture."""

    hidden: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (256, 128, 64, 64)
    """Units of each layer; the last is the feature dimension."""


class MLP(nn.Module):
    """Features of fully connected layers: D = the last layer's units.

    References:
        Santoro et al., Meta-Learning with Memory-Augmented Neural Networks, 2016; the sizes are the
        non-convolutional ones of Finn et al., 2017, section 5.2, arXiv:1703.03400.
    """

    def __init__(self, config: MLPConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        sizes = [math.prod(image_shape), *config.hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(BatchNorm(f"norms.{i}", b) for i, b in enumerate(config.hidden))
        self.feature_dim = sizes[-1]

    def forward(self, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        """Features [B, D] of pictures [B, C, H, W], and the statistics of this batch."""
        collected: Statistics = {}
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x), statistics, collected))
        return x, collected
