"""Several tasks as one: the same pure functions with a task axis in front.

T tasks, all of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.inner_loop import InnerLoop
from pipeline.core.functional import Model
from pipeline.core.types import Metrics, Params, Task

_TASK_AXES = Task(0, 0, 0, 0, None)  # type: ignore[arg-type]


def stack(tasks: Sequence[Task]) -> Task:
    """One Task whose tensors have a task axis in front.

    Raises:
        ValueError: the tasks differ in ways, support or query size.
    """
    shapes = {(t.num_ways, len(t.support_y), len(t.query_y)) for t in tasks}
    if len(shapes) != 1:
        raise ValueError(f"tasks of one group share (ways, support, query) sizes; got {shapes}")
    return Task(
        torch.stack([t.support_x for t in tasks]),
        torch.stack([t.support_y for t in tasks]),
        torch.stack([t.query_x for t in tasks]),
        torch.stack([t.query_y for t in tasks]),
        tasks[0].num_ways,
    )


def batched_loss(
    algorithm: Algorithm, model: Model, params: Params, tasks: Task
) -> tuple[Tensor, Metrics]:
    """`task_loss` of every task under shared parameters: [T] each."""

    def one(task: Task) -> tuple[Tensor, Metrics]:
        return algorithm.task_loss(model, params, task)

    result: tuple[Tensor, Metrics] = torch.vmap(one, in_dims=(_TASK_AXES,))(tasks)
    return result


@dataclass(frozen=True)
class Batched:
    """An `InnerLoop` over T tasks at once: fast weights, gradients and losses carry a task axis.

    Autograd runs outside of `vmap`: the inner gradient of a sum of T losses is each task's own.
    """

    one: InnerLoop
    num_tasks: int

    @property
    def num_inner_steps(self) -> int:
        """K."""
        return self.one.num_inner_steps

    @property
    def first_order(self) -> bool:
        """Whether the inner gradients count as constants."""
        return self.one.first_order

    def start(self, params: Params, num_ways: int) -> Params:
        """The same start for every task, as a view."""
        start = self.one.start(params, num_ways)
        return {n: v.expand(self.num_tasks, *v.shape) for n, v in start.items()}

    def step(self, params: Params, fast: Params, gradient: Params, index: int) -> Params:
        """One step of every task."""

        def one(fast: Params, gradient: Params) -> Params:
            return self.one.step(params, fast, gradient, index)

        result: Params = torch.vmap(one)(fast, gradient)
        return result

    def support_loss(
        self, model: Model, params: Params, fast: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        """[T]"""

        def one(fast: Params, x: Tensor, y: Tensor) -> Tensor:
            return self.one.support_loss(model, params, fast, x, y)

        result: Tensor = torch.vmap(one)(fast, x, y)
        return result

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[Tensor, Metrics]:
        """[T] each"""

        def one(fast: Params, task: Task) -> tuple[Tensor, Metrics]:
            return self.one.query_loss(model, params, fast, task)

        axes = (0, _TASK_AXES)
        result: tuple[Tensor, Metrics] = torch.vmap(one, in_dims=axes)(fast, task)
        return result
