"""The four-block convolutional network of the few-shot literature."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.backbones.convolution import Convolution
from pipeline.backbones.layout import channels_last
from pipeline.backbones.norm import BatchNorm
from pipeline.core.config import Section
from pipeline.core.types import Statistics


class Conv4Config(Section):
    """Conv4: four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pooling."""

    width: PositiveInt = 64
    """Channels of every block."""


class Conv4(nn.Module):
    """Features of four convolution blocks, flattened: D = width * (H // 16) * (W // 16).

    References:
        Vinyals et al., Matching Networks, 2016, section 4.1, arXiv:1606.04080. The convolutions
        have no biases: batch norm takes them out again.
    """

    def __init__(self, config: Conv4Config, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        sizes = [channels] + [config.width] * 4
        self.convs = nn.ModuleList(Convolution(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(BatchNorm(f"norms.{i}", config.width) for i in range(4))
        self.feature_dim = config.width * (height // 16) * (width // 16)

    def forward(self, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        """Features [B, D] of pictures [B, C, H, W], and the statistics of this batch."""
        collected: Statistics = {}
        x = channels_last(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # The maximum of a ReLU is the ReLU of the maximum, on a quarter of the numbers.
            if statistics is None or torch.is_grad_enabled() or norm.weight.ndim != 1:
                x = F.relu(F.max_pool2d(norm(conv(x), statistics, collected), 2))
            else:
                x = F.relu(_normalised_maxima(conv, norm, x, statistics))  # type: ignore[arg-type]
        return x.flatten(1), collected


def _normalised_maxima(
    conv: Convolution, norm: BatchNorm, x: Tensor, statistics: Statistics
) -> Tensor:
    """Batch norm behind the pooling too, with the same bits as before it.

    Normalising by given statistics never falls in a channel whose weight is positive, and so leaves
    the maximum where it is. Of a channel with a negative weight the convolution gives the opposite,
    by the opposite filter: rounding is symmetric.
    """
    signs = norm.weight.sign()
    return norm.given(F.max_pool2d(conv(x, signs), 2), statistics, signs)
