"""The residual network of the few-shot literature."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Len
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.backbones.convolution import Convolution
from pipeline.backbones.layout import channels_last
from pipeline.backbones.norm import BatchNorm
from pipeline.core.config import Section
from pipeline.core.types import Statistics


class ResNet12Config(Section):
    """ResNet-12: four residual blocks of three 3x3 convolutions each."""

    widths: Annotated[tuple[PositiveInt, ...], Len(4, 4)] = (64, 128, 256, 512)
    """Channels of the four blocks; the papers use 64-128-256-512 or 64-160-320-640."""


class _Block(nn.Module):
    def __init__(self, name: str, before: int, after: int) -> None:
        super().__init__()
        sizes = [before, after, after]
        self.convs = nn.ModuleList(Convolution(size, after) for size in sizes)
        self.norms = nn.ModuleList(BatchNorm(f"{name}.norms.{i}", after) for i in range(3))
        self.shortcut = Convolution(before, after, side=1)
        self.shortcut_norm = BatchNorm(f"{name}.shortcut_norm", after)

    def forward(self, x: Tensor, statistics: Statistics | None, collected: Statistics) -> Tensor:
        identity = self.shortcut_norm(self.shortcut(x), statistics, collected)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), statistics, collected)
            if i < 2:
                x = F.leaky_relu(x, 0.1)
        return F.max_pool2d(F.leaky_relu(x + identity, 0.1), 2)


class ResNet12(nn.Module):
    """Features of four residual blocks, averaged over space: D = the last width.

    References:
        Lee et al., Meta-Learning with Differentiable Convex Optimization, 2019, section 4.1,
        arXiv:1904.03758. No DropBlock.
    """

    def __init__(self, config: ResNet12Config, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        befores = [image_shape[0], *config.widths[:3]]
        self.blocks = nn.ModuleList(
            _Block(f"blocks.{i}", before, after)
            for i, (before, after) in enumerate(zip(befores, config.widths, strict=True))
        )
        self.feature_dim = config.widths[-1]

    def forward(self, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        """Features [B, D] of pictures [B, C, H, W], and the statistics of this batch."""
        collected: Statistics = {}
        x = channels_last(x)
        for block in self.blocks:
            x = block(x, statistics, collected)
        return x.mean(dim=(2, 3)), collected
