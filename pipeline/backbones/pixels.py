"""No network at all: the pixels are the features."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pipeline.core.config import Section
from pipeline.core.types import Statistics


class PixelsConfig(Section):
    """Nothing to choose."""


class Pixels(nn.Module):
    """The flattened input, D = C * H * W: the floor under every learned feature."""

    def __init__(self, config: PixelsConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.feature_dim = math.prod(image_shape)

    def forward(self, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        """Features [B, D] of inputs [B, ...]; there are no statistics."""
        return x.flatten(1), {}
