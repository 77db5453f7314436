"""The other ways to a meta-gradient in PyTorch, each as its users write it.

Every peer adds the meta-gradients of some tasks to `.grad` of a plain module; all but `functorch`
take one task at a time, as their own examples do. learn2learn itself does not install beside the
pinned versions; `eager` does what it does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pipeline.core.types import Params, Task


class Inner(NamedTuple):
    """The inner loop of MAML."""

    lr: float
    num_steps: int
    second_order: bool
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


Peer = Callable[[nn.Module, Sequence[Task], Inner], None]


def eager(network: nn.Module, tasks: Sequence[Task], inner: Inner) -> None:
    """The double-backward loop: clone, take differentiable steps, go back through all of them.

    References:
        Arnold et al., learn2learn, 2020, arXiv:2008.12284: `MAML.clone`, `MAML.adapt`.
    """
    for task in tasks:
        fast = {name: value.clone() for name, value in network.named_parameters()}
        for _ in range(inner.num_steps):
            loss = inner.loss(functional_call(network, fast, (task.support_x,)), task.support_y)
            gradients = torch.autograd.grad(
                loss, list(fast.values()), create_graph=inner.second_order
            )
            fast = {
                name: value - inner.lr * gradient
                for (name, value), gradient in zip(fast.items(), gradients, strict=True)
            }
        inner.loss(functional_call(network, fast, (task.query_x,)), task.query_y).backward()


def higher_loop(network: nn.Module, tasks: Sequence[Task], inner: Inner) -> None:
    """The inner-loop context of `higher`; first order takes the gradient at the fast weights.

    References:
        Grefenstette et al., Generalized Inner Loop Meta-Learning, 2019, arXiv:1910.01727.
    """
    import higher

    optimiser = torch.optim.SGD(network.parameters(), lr=inner.lr)
    for task in tasks:
        with higher.innerloop_ctx(
            network,
            optimiser,
            copy_initial_weights=False,
            track_higher_grads=inner.second_order,
        ) as (fast, differentiable):
            for _ in range(inner.num_steps):
                differentiable.step(inner.loss(fast(task.support_x), task.support_y))
            loss = inner.loss(fast(task.query_x), task.query_y)
            if inner.second_order:
                loss.backward()
            else:
                _add(network, torch.autograd.grad(loss, list(fast.parameters())))


def torchopt_loop(network: nn.Module, tasks: Sequence[Task], inner: Inner) -> None:
    """TorchOpt's MetaSGD, with its state saved and restored around every task.

    MetaSGD knows no first order (its steps always build a graph); for it the library's functional
    optimiser takes plain gradients, which is the quickest that TorchOpt offers.

    References:
        Ren et al., TorchOpt, 2023, arXiv:2211.06934; examples/few-shot/maml_omniglot.py.
    """
    import torchopt

    if not inner.second_order:
        return _torchopt_first_order(torchopt, network, tasks, inner)
    optimiser = torchopt.MetaSGD(network, lr=inner.lr)
    start = torchopt.extract_state_dict(network, by="reference")
    fresh = torchopt.extract_state_dict(optimiser, by="reference")
    for task in tasks:
        for _ in range(inner.num_steps):
            optimiser.step(inner.loss(network(task.support_x), task.support_y))
        inner.loss(network(task.query_x), task.query_y).backward()
        torchopt.recover_state_dict(network, start)
        torchopt.recover_state_dict(optimiser, fresh)


def _torchopt_first_order(
    torchopt: Any, network: nn.Module, tasks: Sequence[Task], inner: Inner
) -> None:
    optimiser = torchopt.sgd(lr=inner.lr)
    for task in tasks:
        fast = tuple(value.detach().requires_grad_() for value in network.parameters())
        names = [name for name, _ in network.named_parameters()]
        state = optimiser.init(fast)
        for _ in range(inner.num_steps):
            logits = functional_call(network, dict(zip(names, fast, strict=True)), task.support_x)
            gradients = torch.autograd.grad(inner.loss(logits, task.support_y), fast)
            updates, state = optimiser.update(gradients, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
            fast = tuple(value.detach().requires_grad_() for value in fast)
        logits = functional_call(network, dict(zip(names, fast, strict=True)), task.query_x)
        _add(network, torch.autograd.grad(inner.loss(logits, task.query_y), fast))


def functorch(network: nn.Module, tasks: Sequence[Task], inner: Inner) -> None:
    """PyTorch's own recipe: `grad` of a task's loss, `vmap` over tasks.

    With two or more inner steps through `nn.BatchNorm2d` its result is off by some 1e-4, in float64
    too (torch 2.13); finite differences side with all the others. It runs as it is.

    References:
        pytorch/pytorch, functorch/examples/maml_omniglot and maml_regression.
    """

    def support_loss(fast: Params, x: Tensor, y: Tensor) -> Tensor:
        return inner.loss(functional_call(network, fast, (x,)), y)

    def task_loss(start: Params, task: tuple[Tensor, ...]) -> Tensor:
        support_x, support_y, query_x, query_y = task
        fast = start
        for _ in range(inner.num_steps):
            gradients = grad(support_loss)(fast, support_x, support_y)
            if not inner.second_order:
                gradients = {name: value.detach() for name, value in gradients.items()}
            fast = {name: value - inner.lr * gradients[name] for name, value in fast.items()}
        return inner.loss(functional_call(network, fast, (query_x,)), query_y)

    def total_loss(start: Params, stacked: tuple[Tensor, ...]) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0))(start, stacked).sum()

    stacked = tuple(torch.stack([task[i] for task in tasks]) for i in range(4))
    start = {name: value.detach() for name, value in network.named_parameters()}
    _add(network, list(grad(total_loss)(start, stacked).values()))


def plain_protonet(network: nn.Module, tasks: Sequence[Task], inner: Inner) -> None:
    """The plainest correct training loop of a prototypical network; `inner` plays no part.

    References:
        Snell et al., 2017, algorithm 1, arXiv:1703.05175.
    """
    for task in tasks:
        features = network.backbone(torch.cat([task.support_x, task.query_x]))
        support, query = features[: len(task.support_x)], features[len(task.support_x) :]
        members = F.one_hot(task.support_y, task.num_ways).T.to(support.dtype)
        centres = members @ support / members.sum(1, keepdim=True)
        distances = ((query[:, None] - centres[None]) ** 2).sum(-1)
        F.cross_entropy(-distances, task.query_y).backward()


def _add(network: nn.Module, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


PEERS: Mapping[str, Peer] = {
    "eager": eager,
    "higher": higher_loop,
    "torchopt": torchopt_loop,
    "functorch": functorch,
    "plain": plain_protonet,
}

ONE_BY_ONE = frozenset(PEERS) - {"functorch"}
"""Peers that take task after task."""

_LIBRARIES = {"higher": "higher", "torchopt": "torchopt"}


def missing_library(name: str) -> str | None:
    """The library that this peer needs and that is not installed."""
    library = _LIBRARIES.get(name)
    return library if library and importlib.util.find_spec(library) is None else None


def versions() -> dict[str, str]:
    """Of the peers' libraries that are installed."""
    return {
        name: metadata.version(name) for name in _LIBRARIES.values() if not missing_library(name)
    }
