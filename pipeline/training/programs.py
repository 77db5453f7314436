"""What a training run optimises: supervised classes (pre-training) or episodes (meta-training).

G groups, T tasks per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core.functional import BACKBONE
from pipeline.core.seeding import random_words
from pipeline.core.types import Params, Task
from pipeline.engine.learner import Learner, Preprocessing
from pipeline.engine.meta_gradient import GroupGradient, meta_gradient
from pipeline.runtime.context import Context
from pipeline.store.reader import Store
from pipeline.tasks.sampler import Episodes, Ints
from pipeline.tasks.stream import TrainStream

_SUPERVISED_STREAM = 5


class Program(Protocol):
    """One training objective, cut into groups that are each computed whole by one worker."""

    @property
    def num_groups(self) -> int:
        """G, part of the run's identity: it fixes the tree of sums."""

    @property
    def items_per_group(self) -> int:
        """T, tasks (or examples) in a group."""

    @property
    def unit(self) -> str:
        """What an item is, for people."""

    def gradient(self, params: Params, position: int, group: int) -> GroupGradient:
        """Sum of the items' gradients, and metrics [T]; pure in its arguments."""

    def learner(self, params: Params) -> Learner:
        """The learner to validate: of these parameters."""


@dataclass(frozen=True)
class MetaTraining:
    """Episodes from the training stream under an algorithm."""

    template: Learner
    """The learner whose parameters are to be trained."""
    store: Store
    stream: TrainStream
    context: Context
    unit: str = "tasks"

    @property
    def num_groups(self) -> int:
        """Groups of the meta-batch."""
        return self.stream.num_groups

    @property
    def items_per_group(self) -> int:
        """Tasks in a group."""
        return self.stream.tasks_per_group

    def gradient(self, params: Params, position: int, group: int) -> GroupGradient:
        """Sum of the group's meta-gradients."""
        episodes = self.stream.group(position, group)
        preprocessing, device = self.template.preprocessing, self.context.device
        tasks = episodes_to_tasks(episodes, self.store, preprocessing, device)
        return meta_gradient(self.template.algorithm, self.template.model, params, tasks)

    def learner(self, params: Params) -> Learner:
        """The template with these parameters."""
        return with_params(self.template, params)


@dataclass(frozen=True)
class Supervised:
    """Plain classification of the training classes; a linear head is learned and dropped.

    References:
        Chen et al., A Closer Look at Few-shot Classification, 2019, section 3.2 (Baseline),
        arXiv:1904.04232.
    """

    template: Learner
    store: Store
    seed: int
    num_groups: int
    items_per_group: int
    context: Context
    unit: str = "examples"

    def init_head(self) -> Params:
        """A linear classifier over the training classes, a pure function of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        num_classes, width = len(self.store.class_ids("train")), self.template.model.feature_dim
        weight = torch.randn(num_classes, width, generator=generator) * width**-0.5
        return {"classifier.weight": weight, "classifier.bias": torch.zeros(num_classes)}

    def gradient(self, params: Params, position: int, group: int) -> GroupGradient:
        """Sum over a group's examples of the gradient of their cross-entropy."""
        rows, labels = self._draw(position, group)
        pictures = torch.as_tensor(self.store.gather(rows)).to(self.context.device)
        inputs = self.template.preprocessing(pictures)
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        model = self.template.model.with_statistics(None)
        features, _ = model.features(leaves, inputs)
        logits = F.linear(features, leaves["classifier.weight"], leaves["classifier.bias"])
        losses = F.cross_entropy(logits, labels, reduction="none")
        gradient = torch.autograd.grad(losses.sum(), list(leaves.values()))
        right = (logits.argmax(-1) == labels).float()
        metrics = {"loss": losses.detach(), "accuracy": right}
        return GroupGradient(dict(zip(leaves, gradient, strict=True)), metrics)

    def learner(self, params: Params) -> Learner:
        """The template with the backbone's parameters; the linear head is left out."""
        kept = {n: p for n, p in params.items() if n.startswith(BACKBONE)}
        return with_params(self.template, kept)

    def _draw(self, position: int, group: int) -> tuple[Ints, torch.Tensor]:
        first = (position * self.num_groups + group) * self.items_per_group
        indices = np.arange(first, first + self.items_per_group)
        words = random_words(self.seed, _SUPERVISED_STREAM, indices, 2)
        classes = [self.store.classes[i] for i in self.store.class_ids("train")]
        counts = np.array([c.count for c in classes], np.uint64)
        offsets = np.array([c.offset for c in classes], np.int64)
        label = ((words[:, 0] * np.uint64(len(classes))) >> np.uint64(32)).astype(np.int64)
        row = offsets[label] + ((words[:, 1] * counts[label]) >> np.uint64(32)).astype(np.int64)
        return row, torch.as_tensor(label, device=self.context.device)


def episodes_to_tasks(
    episodes: Episodes, store: Store, preprocessing: Preprocessing, device: torch.device
) -> list[Task]:
    """Gather the pictures of a group of episodes and cut them into tasks."""
    num_support = episodes.support_rows.shape[1]
    num_ways = episodes.classes.shape[1]
    rows = np.concatenate([episodes.support_rows, episodes.query_rows], axis=1)
    inputs = preprocessing(torch.as_tensor(store.gather(rows)).to(device))
    support_y = torch.as_tensor(episodes.support_labels.copy(), device=device)
    query_y = torch.as_tensor(episodes.query_labels.copy(), device=device)
    return [
        Task(x[:num_support], sy, x[num_support:], qy, num_ways)
        for x, sy, qy in zip(inputs, support_y, query_y, strict=True)
    ]


def with_params(learner: Learner, params: Mapping[str, torch.Tensor]) -> Learner:
    """The same learner with other parameters and no population statistics yet."""
    model = learner.model.with_statistics(None)
    return replace(learner, params=dict(params), model=model)
