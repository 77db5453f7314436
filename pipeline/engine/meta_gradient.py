"""The gradient of a group of tasks with respect to the meta-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.algorithms.base import Algorithm
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task


class GroupGradient(NamedTuple):
    """Sum of the gradients of a group's tasks, and each task's metrics."""

    gradient: Params
    metrics: dict[str, Tensor]
    """[T] per task, by name"""


def meta_gradient(
    algorithm: Algorithm, model: Model, params: Params, tasks: Sequence[Task]
) -> GroupGradient:
    """Sum over tasks of d task_loss / d params, one task at a time.

    One task at a time is the fastest plain strategy on a CPU: batching tasks turns convolutions
    into grouped ones (see docs/log.md).

    Args:
        params: meta-parameters; they are not changed and need not require gradients.
    """
    names = list(params)
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    total: list[Tensor] | None = None
    rows = []
    for task in tasks:
        loss, metrics = algorithm.task_loss(model, leaves, task)
        gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        rows.append(metrics)
        if total is None:
            total = [g.clone() for g in gradient]
        else:
            torch._foreach_add_(total, list(gradient))
    if total is None:
        raise ValueError("meta_gradient needs at least one task")
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return GroupGradient(dict(zip(names, total, strict=True)), stacked)
