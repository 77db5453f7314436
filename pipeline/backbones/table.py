"""The backbones, by name: a new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.backbones.conv4 import Conv4, Conv4Config
from pipeline.backbones.mlp import MLP, MLPConfig
from pipeline.backbones.pixels import Pixels, PixelsConfig
from pipeline.backbones.resnet12 import ResNet12, ResNet12Config
from pipeline.core.config import Section, parse_section
from pipeline.core.errors import ConfigError
from pipeline.core.functional import BACKBONE, BatchNormMode, Model
from pipeline.core.types import Params

ImageShape = tuple[int, int, int]


class Backbone(NamedTuple):
    """One row: how a backbone is configured and built."""

    config: type[Section]
    build: Callable[[Any, ImageShape], nn.Module]


BACKBONES: Mapping[str, Backbone] = {
    "conv4": Backbone(Conv4Config, Conv4),
    "resnet12": Backbone(ResNet12Config, ResNet12),
    "mlp": Backbone(MLPConfig, MLP),
    "pixels": Backbone(PixelsConfig, Pixels),
}


class BackboneSpec(Section):
    """A backbone by name, with its settings and the pictures that it takes."""

    name: str
    settings: dict[str, Any]
    image_shape: ImageShape
    """(channels, height, width)"""


def build_model(spec: BackboneSpec, batch_norm: BatchNormMode) -> Model:
    """The backbone as a pure function; its skeleton holds no weights.

    Raises:
        ConfigError: unknown name or settings, or pictures too small for this backbone.
    """
    module = _build(spec, device="meta")
    return Model(module, int(module.feature_dim), batch_norm)  # type: ignore[arg-type]


def init_params(spec: BackboneSpec, seed: int) -> Params:
    """Fresh weights by PyTorch's default initialisation, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _build(spec, device="cpu")
    return {BACKBONE + name: value.detach() for name, value in module.named_parameters()}


def _build(spec: BackboneSpec, *, device: str) -> nn.Module:
    if spec.name not in BACKBONES:
        raise ConfigError(f"no backbone {spec.name!r}. Known ones: {', '.join(BACKBONES)}.")
    row = BACKBONES[spec.name]
    config = parse_section(spec.settings, row.config, where=f"backbone {spec.name}")
    with torch.device(device):
        module = row.build(config, spec.image_shape)
    if int(module.feature_dim) < 1:  # type: ignore[arg-type]
        raise ConfigError(
            f"backbone {spec.name} cannot take {spec.image_shape[1]}x{spec.image_shape[2]} "
            "pictures: nothing is left after its poolings. Raise preprocess.image_size to 16 or "
            "more."
        )
    return module
