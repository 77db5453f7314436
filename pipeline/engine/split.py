"""The meta-gradient in pieces that no graph spans: memory does not grow with the inner steps.

K inner steps, theta the meta-parameters, phi_k the fast weights after k steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.algorithms.inner_loop import InnerLoop, inner_gradient
from pipeline.core.functional import Model
from pipeline.core.types import Metrics, Params, Task


def split_gradient(
    algorithm: InnerLoop,
    model: Model,
    params: Params,
    task: Task,
    *,
    query_model: Model | None = None,
    stride: int = 1,
) -> tuple[Params, Metrics]:
    """d query loss / d theta, walking the inner loop backwards.

    With c_K = dL_query/dphi_K, a first-order pass at the adapted weights, and
    phi_{k+1} = step(theta, phi_k, g_k), g_k = dL_support/dphi_k:

        c_k = c_{k+1} dstep/dphi_k + H_k (c_{k+1} dstep/dg_k),    H_k = d g_k / d phi_k

    one Hessian-vector product for each step, plus the parts that go to theta directly. The graph of
    step k is built anew from phi_k, used and dropped. A first-order algorithm has no H_k, and its
    plain graph holds no activations of the inner loop: it has nothing to gain here.

    Args:
        query_model: for the queries, where it is another one: of lower precision, say.
        stride: every `stride`-th phi_k is kept and the others are computed again, so that
            K / stride + stride copies of the weights are alive at most.

    References:
        Finn et al., 2017, eq. 1, arXiv:1703.03400; reversible-in-storage unrolling as in Franceschi
        et al., 2017, algorithm 1, arXiv:1703.01785; Kemaev et al., MixFlow-MG, 2025,
        arXiv:2505.00793, on products without a graph through the whole loop.
    """
    constant = {n: p.detach() for n, p in params.items()}
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    with torch.no_grad():
        start = algorithm.start(constant, task.num_ways)
    kept, last = _run(algorithm, model, constant, start, task, stride)

    fast = _leaves(last)
    loss, metrics = algorithm.query_loss(query_model or model, leaves, fast, task)
    total, cotangent = _products([loss.sum()], [None], leaves, fast)
    del loss, fast, last
    for index, before in _backwards(algorithm, model, constant, kept, task, stride):
        direct, cotangent = _through_step(algorithm, model, leaves, before, cotangent, task, index)
        total = add(total, direct)

    begin = algorithm.start(leaves, task.num_ways)
    first, _ = _products(list(begin.values()), list(cotangent.values()), leaves, {})
    total = add(total, first)
    return total, metrics


def _run(
    algorithm: InnerLoop, model: Model, params: Params, fast: Params, task: Task, stride: int
) -> tuple[dict[int, Params], Params]:
    """All inner steps without a graph; every `stride`-th phi_k, and phi_K."""
    kept = {}
    for index in range(algorithm.num_inner_steps):
        if index % stride == 0:
            kept[index] = fast
        fast = _advance(algorithm, model, params, fast, task, index)
    return kept, fast


def _advance(
    algorithm: InnerLoop, model: Model, params: Params, fast: Params, task: Task, index: int
) -> Params:
    leaves = _leaves(fast)
    loss = algorithm.support_loss(model, params, leaves, task.support_x, task.support_y)
    gradient = inner_gradient(loss, leaves, create_graph=False)
    with torch.no_grad():
        return algorithm.step(params, fast, gradient, index)


def _backwards(
    algorithm: InnerLoop,
    model: Model,
    params: Params,
    kept: dict[int, Params],
    task: Task,
    stride: int,
) -> Iterator[tuple[int, Params]]:
    """(k, phi_k) from the last step to the first, each segment computed again from its start."""
    for begin in sorted(kept, reverse=True):
        segment = [kept.pop(begin)]
        end = min(begin + stride, algorithm.num_inner_steps)
        for index in range(begin, end - 1):
            segment.append(_advance(algorithm, model, params, segment[-1], task, index))
        for index in reversed(range(begin, end)):
            yield index, segment.pop()


def _through_step(
    algorithm: InnerLoop,
    model: Model,
    params: Params,
    before: Params,
    cotangent: Params,
    task: Task,
    index: int,
) -> tuple[Params, Params]:
    """Cotangents of theta and of phi_k for the cotangent of phi_{k+1}."""
    fast = _leaves(before)
    loss = algorithm.support_loss(model, params, fast, task.support_x, task.support_y)
    gradient = inner_gradient(loss, fast, create_graph=True)
    after = algorithm.step(params, fast, gradient, index)
    return _products([after[n] for n in cotangent], list(cotangent.values()), params, fast)


def _products(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], *inputs: Params
) -> tuple[Params, Params]:
    """Vector-Jacobian products of outputs with two sets of named inputs."""
    first, second = inputs
    values = torch.autograd.grad(
        outputs,
        [*first.values(), *second.values()],
        cotangents,
        materialize_grads=True,
    )
    named = list(zip([*first, *second], values, strict=True))
    return dict(named[: len(first)]), dict(named[len(first) :])


def _leaves(fast: Params) -> Params:
    return {n: v.detach().requires_grad_() for n, v in fast.items()}


def add(total: Params, more: Params) -> Params:
    """Sum by name; nothing is changed in place, for gradients may share memory."""
    sums = torch._foreach_add(list(total.values()), [more[n] for n in total])
    return dict(zip(total, sums, strict=True))
