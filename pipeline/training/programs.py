"""What a training run optimises: supervised classes (pre-training) or episodes (meta-training).

G groups, T tasks per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.functional import BACKBONE
from pipeline.core.seeding import random_words
from pipeline.core.types import Params, Task
from pipeline.engine.learner import Learner
from pipeline.engine.meta_gradient import GroupGradient
from pipeline.engine.runner import Runner
from pipeline.runtime.context import Context
from pipeline.store.reader import Store
from pipeline.tasks.sampler import ClassTable, Ints, class_table
from pipeline.tasks.stream import TrainStream
from pipeline.training.augment import EXAMPLE_MOVES, OFF, AugmentConfig, draw_moves, moved
from pipeline.training.episodes import HostEpisodes, blocks, episode_feed, num_ahead
from pipeline.training.feed import Feed, Key
from pipeline.training.pictures import to_device, training_pictures

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

    def feed(self, groups: Sequence[int]) -> Feed[Any, Any]:
        """The batches of these groups, one after another; each is pure in (position, group)."""

    def gradient(self, params: Params, batch: Any) -> GroupGradient:
        """Sum of the gradients of a batch's items, and metrics [T]; pure in its arguments."""

    def learner(self, params: Params) -> Learner:
        """The learner to validate: of these parameters."""

    def describe(self, position: int, group: int) -> list[dict[str, Any]]:
        """What the items of a group are: `index`, `seed`, names of `classes`, and more; pure."""

    def alone(self, params: Params, batch: Any) -> list[Params]:
        """The gradient of each item of a batch by itself."""


@dataclass(frozen=True)
class MetaTraining:
    """Episodes from the training stream under an algorithm."""

    template: Learner
    """The learner whose parameters are to be trained."""
    store: Store
    stream: TrainStream
    context: Context
    runner: Runner
    """Computes the gradients, by the strategy that was chosen for the run."""
    augment: AugmentConfig = OFF
    unit: str = "tasks"

    @property
    def num_groups(self) -> int:
        """Groups of the meta-batch."""
        return self.stream.num_groups

    @property
    def items_per_group(self) -> int:
        """Tasks in a group."""
        return self.stream.tasks_per_group

    def feed(self, groups: Sequence[int]) -> Feed[HostEpisodes, list[Task]]:
        """The tasks of these groups."""
        device = self.context.device
        source = training_pictures(self.store, device)
        ahead = num_ahead(groups, device)
        preprocessing = self.template.preprocessing
        return episode_feed(
            self.stream, source, preprocessing, groups, device, ahead=ahead, augment=self.augment
        )

    def gradient(self, params: Params, batch: list[Task]) -> GroupGradient:
        """Sum of the tasks' meta-gradients."""
        learner = self.template
        return self.runner(learner.algorithm, learner.model, params, batch)

    def learner(self, params: Params) -> Learner:
        """The template with these parameters."""
        return with_params(self.template, params)

    def describe(self, position: int, group: int) -> list[dict[str, Any]]:
        """Each task's place in the stream, shape and classes."""
        ways, shots = self.stream.shape(position, group)
        shape = {"seed": self.stream.seed, "ways": ways, "shots": shots}
        known = self.store.classes
        return [
            {"index": int(index), **shape, "classes": [known[c].name for c in ids.tolist()]}
            for index, ids in zip(
                self.stream.indices(position, group),
                self.stream.group(position, group).classes,
                strict=True,
            )
        ]

    def alone(self, params: Params, batch: list[Task]) -> list[Params]:
        """Each task's meta-gradient."""
        return [dict(self.gradient(params, [task]).gradient) for task in batch]


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
    augment: AugmentConfig = OFF
    unit: str = "examples"

    def init_head(self) -> Params:
        """A linear classifier over the training classes, a pure function of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        num_classes, width = len(self.store.class_ids("train")), self.template.model.feature_dim
        weight = torch.randn(num_classes, width, generator=generator) * width**-0.5
        return {"classifier.weight": weight, "classifier.bias": torch.zeros(num_classes)}

    def feed(self, groups: Sequence[int]) -> Feed[HostExamples, Examples]:
        """The examples of these groups."""
        device = self.context.device
        source = training_pictures(self.store, device)
        table = class_table(self.store, "train", min_examples=0)

        def load(keys: Iterator[Key]) -> Iterator[HostExamples]:
            for block in blocks(keys):
                for rows, labels, moves in self._draw(table, block):
                    yield HostExamples(source.fetch(rows), torch.from_numpy(labels), moves)

        def land(host: HostExamples) -> Examples:
            pictures = moved(source.pictures(to_device(host.fetched, device)), host.moves)
            return Examples(self.template.preprocessing(pictures), to_device(host.labels, device))

        return Feed(load, land, groups, ahead=num_ahead(groups, device))

    def gradient(self, params: Params, batch: Examples) -> GroupGradient:
        """Sum over the examples of the gradient of their cross-entropy."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        losses, logits = self._losses(leaves, batch)
        gradient = torch.autograd.grad(losses.sum(), list(leaves.values()))
        right = (logits.argmax(-1) == batch.labels).float()
        metrics = {"loss": losses.detach(), "accuracy": right}
        return GroupGradient(dict(zip(leaves, gradient, strict=True)), metrics)

    def _losses(self, leaves: Params, batch: Examples) -> tuple[Tensor, Tensor]:
        """Cross-entropies [T] and logits [T, classes]."""
        model = self.template.model.with_statistics(None)
        features, _ = model.features(leaves, batch.inputs)
        logits = F.linear(features, leaves["classifier.weight"], leaves["classifier.bias"])
        return F.cross_entropy(logits, batch.labels, reduction="none"), logits

    def learner(self, params: Params) -> Learner:
        """The template with the backbone's parameters; the linear head is left out."""
        kept = {n: p for n, p in params.items() if n.startswith(BACKBONE)}
        return with_params(self.template, kept)

    def describe(self, position: int, group: int) -> list[dict[str, Any]]:
        """Each example's place in the stream, class and name."""
        table = class_table(self.store, "train", min_examples=0)
        ((rows, labels, _),) = self._draw(table, [(position, group)])
        (indices,) = self._indices([(position, group)])
        found = zip(
            indices.tolist(), table.ids[labels].tolist(), self.store.names(rows), strict=True
        )
        return [
            {"index": i, "seed": self.seed, "classes": [self.store.classes[c].name], "example": n}
            for i, c, n in found
        ]

    def alone(self, params: Params, batch: Examples) -> list[Params]:
        """The gradient of each example's cross-entropy, under the batch norm of the whole group."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        losses, _ = self._losses(leaves, batch)
        inputs = list(leaves.values())
        each = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses)
        return [dict(zip(leaves, gradient, strict=True)) for gradient in each]

    def _indices(self, keys: Sequence[Key]) -> Ints:
        """[groups, T]: places in the stream of some groups' examples."""
        groups = np.array([position * self.num_groups + group for position, group in keys])
        return groups[:, None] * self.items_per_group + np.arange(self.items_per_group)

    def _draw(
        self, table: ClassTable, keys: Sequence[Key]
    ) -> Iterator[tuple[Ints, Ints, Tensor | None]]:
        """Rows and labels [T] of some groups, a class, then one of its examples; and its moves."""
        indices = self._indices(keys)
        words = random_words(self.seed, _SUPERVISED_STREAM, indices, 2)
        num_classes, counts = np.uint64(len(table.ids)), table.counts.astype(np.uint64)
        label = ((words[..., 0] * num_classes) >> np.uint64(32)).astype(np.int64)
        picked = ((words[..., 1] * counts[label]) >> np.uint64(32)).astype(np.int64)
        moves = draw_moves(
            self.augment,
            seed=self.seed,
            stream=EXAMPLE_MOVES,
            indices=indices,
            sizes=[1] * len(keys),
        )
        return zip(table.offsets[label] + picked, label, moves, strict=True)


class HostExamples(NamedTuple):
    """A group of labelled pictures in host memory."""

    fetched: Tensor
    """[T, ...]: pictures or row numbers"""
    labels: Tensor
    """[T]"""
    moves: Tensor | None
    """[T, 1, 3], of the pictures; None leaves them as they are"""


class Examples(NamedTuple):
    """A group of labelled inputs on the device."""

    inputs: Tensor
    """[T, C, H, W]"""
    labels: Tensor
    """[T]"""


def with_params(learner: Learner, params: Mapping[str, Tensor]) -> Learner:
    """The same learner with other parameters and no population statistics yet."""
    model = learner.model.with_statistics(None)
    return replace(learner, params=dict(params), model=model)
