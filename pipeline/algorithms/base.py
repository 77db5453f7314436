"""What an algorithm is: a frozen value with pure functions of (model, params, task)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Generator, Tensor

from pipeline.core.functional import BatchNormMode, Model
from pipeline.core.types import Metrics, Params, Statistics, Task


class Adapted(NamedTuple):
    """What an algorithm keeps of a support set: all that `predict` needs beside the model."""

    tensors: Params
    """By name; what they are is the algorithm's affair."""
    statistics: Statistics | None
    """Batch-norm statistics for the queries; None: the queries' own."""


@runtime_checkable
class Algorithm(Protocol):
    """A few-shot learner. It keeps nothing between calls and knows no device, rank or worker."""

    trainable: ClassVar[bool]
    """Whether meta-training changes anything."""
    embeds_each_example: ClassVar[bool]
    """Whether pictures enter only through their own features, which may then be cached."""

    @property
    def batch_norm(self) -> BatchNormMode:
        """Whose statistics normalise the queries."""

    def init(self, feature_dim: int, generator: Generator) -> Params:
        """Meta-parameters of its own, beside the backbone's."""

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        """Scalar loss of one task, differentiable in `params`, and detached metrics."""

    def adapt(
        self, model: Model, params: Params, support_x: Tensor, support_y: Tensor, num_ways: int
    ) -> Adapted:
        """Learn the classes of a support set ([S, C, H, W] pictures, [S] labels in [0, N))."""

    def predict(self, model: Model, params: Params, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Logits [Q, N] of pictures [Q, C, H, W]."""
