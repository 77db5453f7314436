"""One battery for every row of the backbone table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.backbones.table import BACKBONES, BackboneSpec, build_model, init_params
from pipeline.core.errors import ConfigError
from pipeline.core.functional import BACKBONE
from pipeline.training.pretrain import PretrainConfig

CONTRACT: list[tuple[str, dict[str, Any]]] = [
    ("conv4", {"width": 8}),
    ("resnet12", {"widths": [4, 6, 8, 10]}),
    ("mlp", {"hidden": [12, 7]}),
    ("pixels", {}),
]


def test_the_battery_is_complete() -> None:
    assert {name for name, _ in CONTRACT} == set(BACKBONES)
    assert set(BACKBONES) - {"pixels"} <= set(PretrainConfig.model_fields)


@pytest.mark.parametrize(("name", "settings"), CONTRACT)
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 20)])
def test_features(name: str, settings: dict[str, Any], image_shape: tuple[int, int, int]) -> None:
    spec = BackboneSpec(name=name, settings=settings, image_shape=image_shape)
    model, params = build_model(spec, "running"), init_params(spec, seed=3)
    assert all(p.is_meta for p in model.skeleton.parameters()), "a skeleton has no weights"
    torch.manual_seed(0)
    x = torch.randn(6, *image_shape)
    features, statistics = model.features(params, x)
    assert features.shape == (6, model.feature_dim)
    again, _ = model.features(params, x, statistics)
    torch.testing.assert_close(again, features, rtol=1e-3, atol=1e-4)
    one_by_one = torch.cat([model.features(params, row[None], statistics)[0] for row in x])
    torch.testing.assert_close(one_by_one, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), CONTRACT)
def test_weights_are_a_pure_function_of_the_seed(name: str, settings: dict[str, Any]) -> None:
    spec = BackboneSpec(name=name, settings=settings, image_shape=(1, 28, 28))
    before = torch.get_rng_state()
    one, same, other = (init_params(spec, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert name == "pixels" or any(not torch.equal(one[n], other[n]) for n in one)
    assert all(n.startswith(BACKBONE) for n in one)


@pytest.mark.parametrize(("name", "settings"), CONTRACT)
def test_a_missing_or_unknown_weight_is_an_error(name: str, settings: dict[str, Any]) -> None:
    spec = BackboneSpec(name=name, settings=settings, image_shape=(1, 28, 28))
    model, params = build_model(spec, "running"), init_params(spec, seed=0)
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.features({**params, BACKBONE + "other": torch.zeros(1)}, torch.zeros(2, 1, 28, 28))
    if params:
        del params[next(iter(params))]
        with pytest.raises(RuntimeError, match="Missing"):
            model.features(params, torch.zeros(2, 1, 28, 28))


def test_conv4_is_the_network_of_the_papers() -> None:
    """Against the same layers written with torch.nn alone."""
    spec = BackboneSpec(name="conv4", settings={"width": 64}, image_shape=(1, 28, 28))
    model, params = build_model(spec, "running"), init_params(spec, seed=0)
    blocks: list[nn.Module] = []
    for i in range(4):
        conv, norm = nn.Conv2d(1 if i == 0 else 64, 64, 3, padding=1), nn.BatchNorm2d(64)
        conv.weight.data = params[f"backbone.convs.{i}.weight"]
        assert conv.bias is not None  # any bias will do: batch norm takes it out again
        blocks += [conv, norm, nn.ReLU(), nn.MaxPool2d(2)]
    x = torch.randn(5, 1, 28, 28)
    expected = nn.Sequential(*blocks, nn.Flatten())(x)
    torch.testing.assert_close(model.features(params, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert model.feature_dim == 64


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            BackboneSpec(name="vgg", settings={}, image_shape=(1, 28, 28)),
            "no backbone 'vgg'.*conv4",
        ),
        (
            BackboneSpec(name="conv4", settings={"depth": 3}, image_shape=(1, 28, 28)),
            "depth: unknown key. Known keys: width",
        ),
        (
            BackboneSpec(name="conv4", settings={}, image_shape=(1, 12, 12)),
            "cannot take 12x12 pictures",
        ),
    ],
)
def test_a_wrong_specification_is_an_error(spec: BackboneSpec, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_model(spec, "running")
