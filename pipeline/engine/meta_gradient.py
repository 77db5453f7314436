"""The gradient of a group of tasks with respect to the meta-parameters: one door, four ways.

T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.inner_loop import InnerLoop, inner_loop_loss
from pipeline.core.functional import Model
from pipeline.core.types import Metrics, Params, Task
from pipeline.engine.batched import Batched, batched_loss, stack
from pipeline.engine.split import split_gradient

Strategy = Literal["loop", "vmap", "split", "vmap_split"]
Arithmetic = Literal["fp32", "tf32", "bf16"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class GroupGradient(NamedTuple):
    """Sum of the gradients of a group's tasks, and each task's metrics."""

    gradient: Params
    metrics: dict[str, Tensor]
    """[T] per task, by name"""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a gradient is computed; every strategy gives the same one, within rounding."""

    strategy: Strategy = "loop"
    """loop: one task at a time, one graph through its inner loop. vmap: many tasks as one.
    split: one task at a time, in pieces, so that memory does not grow with the inner steps.
    vmap_split: many tasks as one, in pieces."""
    precision: Arithmetic = "fp32"
    """bf16: the network's convolutions and matrix products in bfloat16, all else in fp32. The inner
    loop stays in fp32: it is the small part of the work, and rounding errors grow through it.
    tf32: on a GPU, convolutions and products round their inputs to 10 bits, as its tensor cores
    take them; bf16 has that for the inner loop there. A CPU knows no tf32: it is fp32."""
    chunk: int | None = None
    """Tasks at once, where they are computed as one; None: all of a group."""
    stride: int = 1
    """Of a split inner loop: every stride-th copy of the fast weights is kept."""
    cuda_graphs: bool = False
    """On a GPU, a run's groups are recorded once for each shape and replayed."""

    @property
    def at_once(self) -> bool:
        """Whether many tasks are computed as one."""
        return self.strategy in ("vmap", "vmap_split")


def meta_gradient(
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    engine: Engine = Engine(),
) -> GroupGradient:
    """Sum over tasks of d task_loss / d params.

    Args:
        params: meta-parameters; they are not changed and need not require gradients.
        tasks: at least one; computed at once, they must share (ways, support, query) sizes.

    Raises:
        ValueError: there is no task, or tasks that are computed at once differ in shape.
    """
    if not tasks:
        raise ValueError("meta_gradient needs at least one task")
    with _tensor_cores(engine.precision != "fp32"):
        return _group_gradient(algorithm, model, params, tasks, engine)


def _group_gradient(
    algorithm: Algorithm, model: Model, params: Params, tasks: Sequence[Task], engine: Engine
) -> GroupGradient:
    size = engine.chunk or len(tasks) if engine.at_once else 1
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    rows = []
    for first in range(0, len(tasks), size):
        gradient, metrics = _chunk_gradient(
            algorithm, model, params, tasks[first : first + size], engine
        )
        rows.append(metrics)
        torch._foreach_add_(list(total.values()), [gradient[n] for n in total])
    metrics = {n: torch.cat([row[n].reshape(-1) for row in rows]) for n in rows[0]}
    return GroupGradient(total, metrics)


def _chunk_gradient(
    algorithm: Algorithm, model: Model, params: Params, tasks: Sequence[Task], engine: Engine
) -> tuple[Params, Metrics]:
    """Gradient of the sum of the losses of tasks that are computed together."""
    task = stack(tasks) if engine.at_once else tasks[0]
    lower = replace(model, precision="bf16" if engine.precision == "bf16" else "fp32")
    if not isinstance(algorithm, InnerLoop):
        loss_of = batched_loss if engine.at_once else _loss_of
        return _through(lambda leaves: loss_of(algorithm, lower, leaves, task), params)
    inner = Batched(algorithm, len(tasks)) if engine.at_once else algorithm
    if engine.strategy in ("split", "vmap_split") and not algorithm.first_order:
        return split_gradient(inner, model, params, task, query_model=lower, stride=engine.stride)
    return _through(
        lambda leaves: inner_loop_loss(inner, model, leaves, task, query_model=lower), params
    )


@contextmanager
def _tensor_cores(allowed: bool) -> Iterator[None]:
    """Whether fp32 convolutions and products of a GPU may be TF32, in here."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def _loss_of(
    algorithm: Algorithm, model: Model, params: Params, task: Task
) -> tuple[Tensor, Metrics]:
    return algorithm.task_loss(model, params, task)


def _through(
    loss_of: Callable[[Params], tuple[Tensor, Metrics]], params: Params
) -> tuple[Params, Metrics]:
    """Plain reverse mode through everything that the loss did."""
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    loss, metrics = loss_of(leaves)
    gradient = torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradient, strict=True)), metrics
