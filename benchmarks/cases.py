"""What is measured: cases, contestants, and tasks that follow from a seed.

T tasks, S support examples, Q query examples.
"""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import nn

from benchmarks.networks import Classifier
from benchmarks.peers import ONE_BY_ONE, PEERS, Inner
from benchmarks.sine import PlainRegressor, SineMAML, sine_task
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.config import Section
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.meta_gradient import Arithmetic

Device = Literal["cpu", "cuda"]
Dtype = Literal["fp64"] | Arithmetic


class Case(Section):
    """One problem, the same for every contestant."""

    number: PositiveInt
    """Which of the numbered cases; several may share one"""
    name: str
    title: str
    kind: Literal["gradient", "memory", "training"] = "gradient"
    """memory: one meta-gradient each, its peak memory is what counts. training: a whole run."""
    algorithm: Literal["maml", "protonet", "sine"] = "maml"
    backbone: BackboneSpec
    ways: PositiveInt = 5
    shots: PositiveInt = 1
    queries: PositiveInt = 15
    """Per class"""
    inner_lr: float = 0.1
    inner_steps: PositiveInt = 5
    second_order: bool = True
    meta_batch: PositiveInt = 32
    groups: PositiveInt = 8
    """Into which the meta-batch is cut on a CPU; each is computed whole by one worker"""
    error_tasks: int = 4
    """Tasks on which gradients are compared; 0 where the float64 reference would not fit"""

    @property
    def inner(self) -> Inner:
        """The inner loop, for peers."""
        loss = F.mse_loss if self.algorithm == "sine" else F.cross_entropy
        return Inner(self.inner_lr, self.inner_steps, self.second_order, loss)

    def tasks_at_once(self, engine: str, device: Device) -> int:
        """The least that a contestant in one process computes at a time.

        Loops on a CPU take task after task; what is batched takes a group, on a card (and for the
        sine's small tensors) the whole meta-batch.
        """
        group = self.meta_batch // self.groups
        if engine in ONE_BY_ONE:
            return 1 if device == "cpu" else group
        return self.meta_batch if device == "cuda" or self.algorithm == "sine" else group


class Contestant(Section):
    """One way of doing it, in processes of its own."""

    engine: str
    """A peer, a strategy of ours, `auto`, or `meta_train`"""
    precision: Dtype = "fp32"
    threads: PositiveInt = 1
    """Of each process"""
    workers: PositiveInt = 1
    """Processes that share the tasks and add up their gradients"""
    device: Device = "cpu"

    @property
    def is_peer(self) -> bool:
        """Whether this is not ours."""
        return self.engine in PEERS

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.engine} {self.precision} {self.workers}x{self.threads}"


class Problem(NamedTuple):
    """A case made of tensors."""

    algorithm: Algorithm
    model: Model
    params: Params
    tasks: list[Task]


def make_problem(case: Case, dtype: torch.dtype, device: Device) -> Problem:
    """Parameters and a meta-batch of tasks: the same numbers for every contestant."""
    algorithm = make_algorithm(case)
    model = build_model(case.backbone, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {**init_params(case.backbone, 0), **own}
    return Problem(
        algorithm=algorithm,
        model=model,
        params={n: p.to(device=device, dtype=dtype) for n, p in params.items()},
        tasks=[_task(case, seed, dtype, device) for seed in range(case.meta_batch)],
    )


def make_algorithm(case: Case) -> Algorithm:
    """Ours, of which every peer computes the same gradient."""
    if case.algorithm == "protonet":
        return ProtoNet()
    settings: dict[str, Any] = {
        "inner_lr": case.inner_lr,
        "num_inner_steps": case.inner_steps,
        "first_order": not case.second_order,
        "batch_norm": "transductive",  # as learn2learn's Conv4 and all peers here do
    }
    return SineMAML(**settings) if case.algorithm == "sine" else MAML(**settings)


def make_network(case: Case, params: Params) -> nn.Module:
    """The peers' plain module, with these values."""
    if case.algorithm == "sine":
        return PlainRegressor(params)
    return Classifier(case.backbone, params, case.ways)


def _task(case: Case, seed: int, dtype: torch.dtype, device: Device) -> Task:
    """Classes are random pictures and examples noisy copies: there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    if case.algorithm == "sine":
        *tensors, ways = sine_task(case.shots, case.queries, generator)
        return Task(*(t.to(device=device, dtype=dtype) for t in tensors), ways)
    pictures = torch.randn(case.ways, *case.backbone.image_shape, generator=generator)

    def draw(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(case.ways).repeat_interleave(per_class)
        noise = torch.randn(len(labels), *case.backbone.image_shape, generator=generator)
        examples = (0.5 * pictures[labels] + 0.5**0.5 * noise).to(device=device, dtype=dtype)
        return examples, labels.to(device)

    return Task(*draw(case.shots), *draw(case.queries), case.ways)


def num_cores() -> int:
    """Cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def _conv4(*image_shape: int) -> BackboneSpec:
    return BackboneSpec(name="conv4", settings={"width": 64}, image_shape=image_shape)


_RESNET12 = BackboneSpec(
    name="resnet12", settings={"widths": [64, 128, 256, 512]}, image_shape=(3, 84, 84)
)
_OMNIGLOT, _MINI = _conv4(1, 28, 28), _conv4(3, 84, 84)
MEMORY_STEPS = (1, 5, 20, 50)


def _omniglot(number: int, name: str, title: str, steps: int, *, second_order: bool) -> Case:
    order = "second" if second_order else "first"
    return Case(
        number=number,
        name=f"{name}-{steps}",
        title=f"{title}, {steps} inner step{'s' * (steps > 1)}, {order} order",
        backbone=_OMNIGLOT,
        inner_steps=steps,
        second_order=second_order,
    )


_SHORT = "Conv4-64, 28x28, 5-way 1-shot"
CASES: tuple[Case, ...] = (
    _omniglot(1, "conv4-28-second", _SHORT, 1, second_order=True),
    _omniglot(1, "conv4-28-second", _SHORT, 5, second_order=True),
    _omniglot(2, "conv4-28-first", _SHORT, 1, second_order=False),
    _omniglot(2, "conv4-28-first", _SHORT, 5, second_order=False),
    Case(
        number=3,
        name="conv4-84",
        title="Conv4-64, 84x84x3, 5-way 5-shot, 5 inner steps, second order",
        backbone=_MINI,
        shots=5,
        inner_lr=0.01,
        meta_batch=4,
        groups=4,
        error_tasks=1,
    ),
    Case(
        number=4,
        name="resnet12-84",
        title="ResNet-12, 84x84x3, 5-way 5-shot, 5 inner steps, second order",
        backbone=_RESNET12,
        shots=5,
        inner_lr=0.01,
        meta_batch=4,
        groups=4,
        error_tasks=1,
    ),
    Case(
        number=5,
        name="sine",
        title="sine regression, MLP 1-40-40-1, K=10, 1 inner step, second order",
        algorithm="sine",
        backbone=BackboneSpec(name="pixels", settings={}, image_shape=(1, 1, 1)),
        ways=1,
        shots=10,
        queries=10,
        inner_lr=0.01,
        inner_steps=1,
        meta_batch=1000,
        error_tasks=100,
    ),
    *(
        Case(
            number=6,
            name=f"memory-{steps}",
            title=f"memory of {steps} inner step{'s' * (steps > 1)}, Conv4-64, 84x84x3, 5w5s",
            kind="memory",
            backbone=_MINI,
            shots=5,
            inner_lr=0.01,
            inner_steps=steps,
            meta_batch=1,
            groups=1,
            error_tasks=int(steps <= 5),
        )
        for steps in MEMORY_STEPS
    ),
    Case(
        number=7,
        name="protonet-60",
        title="ProtoNet, Conv4-64, 28x28, 60-way 1-shot 5 queries",
        algorithm="protonet",
        backbone=_OMNIGLOT,
        ways=60,
        queries=5,
        meta_batch=8,
        error_tasks=2,
    ),
    *(
        Case(
            number=8,
            name=f"scaling-{kind}",
            title=f"workers 1 → 2, {kind} scaling ({about}), Conv4-64, 28x28, 5 inner steps",
            backbone=_OMNIGLOT,
            meta_batch=batch,
            error_tasks=0,
        )
        for kind, about, batch in (
            ("strong", "32 tasks a step in all", 32),
            ("weak", "32 tasks a step and worker", 64),
        )
    ),
    Case(
        number=9,
        name="whole-loop",
        title="whole meta-training, data and validation included: MAML, Conv4-64, 28x28, 5w1s",
        kind="training",
        backbone=_OMNIGLOT,
        meta_batch=32,
        error_tasks=0,
    ),
)


def cases_of(numbers: set[int]) -> list[Case]:
    """The cases with these numbers, in order."""
    return [case for case in CASES if case.number in numbers]
