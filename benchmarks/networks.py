"""The networks of the literature as anyone would write them: plain modules with their own weights.

They compute the same functions as `pipeline/backbones`, from parameters of the same names, so that
one set of values serves all contestants.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.table import BackboneSpec
from pipeline.core.types import Params


class PlainConv4(nn.Module):
    """Four times convolution, batch norm, ReLU, pooling (Vinyals et al., 2016)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        sizes = [spec.image_shape[0], *[spec.settings["width"]] * 4]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b, track_running_stats=False) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] of pictures [B, C, H, W]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return x.flatten(1)


class _PlainBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(size, after, 3, padding=1, bias=False) for size in (before, after, after)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(after, track_running_stats=False) for _ in range(3)
        )
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(after, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut_norm(self.shortcut(x))
        x = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        x = F.leaky_relu(self.norms[1](self.convs[1](x)), 0.1)
        x = self.norms[2](self.convs[2](x))
        return F.max_pool2d(F.leaky_relu(x + identity, 0.1), 2)


class PlainResNet12(nn.Module):
    """Four residual blocks of three convolutions, averaged over space (Lee et al., 2019)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        widths = spec.settings["widths"]
        befores = [spec.image_shape[0], *widths[:3]]
        self.blocks = nn.ModuleList(
            _PlainBlock(before, after) for before, after in zip(befores, widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] of pictures [B, C, H, W]."""
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3))


NETWORKS: Mapping[str, type[PlainConv4] | type[PlainResNet12]] = {
    "conv4": PlainConv4,
    "resnet12": PlainResNet12,
}


class Classifier(nn.Module):
    """A backbone and, for gradient-based learners, a linear head with one row for each class."""

    def __init__(self, spec: BackboneSpec, params: Params, num_ways: int) -> None:
        super().__init__()
        self.backbone = NETWORKS[spec.name](spec)
        values = dict(params)
        if "head.weight" in params:
            self.head = nn.Linear(params["head.weight"].shape[1], num_ways)
            values["head.weight"] = params["head.weight"].expand(num_ways, -1)
            values["head.bias"] = params["head.bias"].expand(num_ways)
        first = next(iter(values.values()))
        self.to(device=first.device, dtype=first.dtype)
        self.load_state_dict({name: value.detach() for name, value in values.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, N]."""
        logits: Tensor = self.head(self.backbone(x))
        return logits


def meta_gradients(network: nn.Module) -> Params:
    """What a peer left in `.grad`, by the names of the meta-parameters.

    Every row of a head starts from one shared vector; expanding it has the sum as adjoint.
    """
    gradients = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        shared = name.startswith("head.")
        gradients[name] = parameter.grad.sum(0, keepdim=True) if shared else parameter.grad.clone()
    return gradients
