"""A program whose numbers are known in closed form: what guards and feeds are tried on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.engine.meta_gradient import GroupGradient
from pipeline.training.feed import Feed, Key


@dataclass(frozen=True)
class Model:
    statistics: None = None


@dataclass(frozen=True)
class Stub:
    """Stands where a learner would: holds the parameters that are to be validated."""

    params: Params
    model: Model = Model()


@dataclass(frozen=True)
class Quadratic:
    """Loss |w|^2 / 2 per item, so that the gradient of a group of two items is 2 w.

    `scales` multiplies the gradient of single (position, group) cells: 100 makes a spike, nan a NaN.
    """

    scales: Mapping[tuple[int, int], float] = field(default_factory=dict)
    noise: float = 0.0
    """Each meta-batch's gradient is multiplied by exp(noise * z), z standard normal."""
    spread: float = 0.0
    """The same for each group of it."""
    seed: int = 0
    num_groups: int = 4
    items_per_group: int = 2
    ahead: int = 0
    unit: str = "tasks"

    def feed(self, groups: Sequence[int]) -> Feed[Key, Key]:
        return Feed(lambda keys: keys, lambda key: key, groups, ahead=self.ahead)

    def gradient(self, params: Params, batch: Key) -> GroupGradient:
        position, group = batch
        scale = self.scales.get((position, group), 1.0) * self.usual(position, group)
        loss = torch.full((2,), float((params["w"] ** 2).sum() / 2) * scale)
        return GroupGradient({"w": 2 * scale * params["w"]}, {"loss": loss, "accuracy": loss * 0})

    def usual(self, position: int, group: int) -> float:
        z, *each = np.random.default_rng([self.seed, position]).standard_normal(9)
        return math.exp(self.noise * z + self.spread * each[group])

    def learner(self, params: Params) -> Learner:
        return cast(Learner, Stub(params))
