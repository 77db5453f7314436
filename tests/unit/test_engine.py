"""Every way to compute a meta-gradient against a closed form, and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.inner_loop import inner_loop_loss
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones import convolution
from pipeline.backbones.products import convolve_each
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.functional import Model
from pipeline.core.types import Metrics, Params, Task
from pipeline.engine.meta_gradient import STRATEGIES, Engine, GroupGradient, meta_gradient

ENGINES = [
    *(Engine(strategy=name) for name in STRATEGIES),
    Engine(strategy="vmap", chunk=2),
    Engine(strategy="split", stride=2),
    Engine(strategy="vmap_split", chunk=2, stride=3),
]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=str)


@dataclass(frozen=True)
class Quadratic:
    """L_support = a/2 (w - c)^2 and L_query = b/2 (w - d)^2 with a learned rate; c, d by task."""

    num_inner_steps: int
    first_order: bool
    a: float = 0.7
    b: float = 1.3

    def start(self, params: Params, num_ways: int) -> Params:
        return {"w": params["w"]}

    def step(self, params: Params, fast: Params, gradient: Params, index: int) -> Params:
        return {"w": fast["w"] - params["rate"] * gradient["w"]}

    def support_loss(
        self, model: Model, params: Params, fast: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        return (self.a / 2 * (fast["w"] - x) ** 2).sum()

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[Tensor, Metrics]:
        loss = (self.b / 2 * (fast["w"] - task.query_x) ** 2).sum()
        return loss, {"loss": loss.detach()}

    def task_loss(self, model: Model, params: Params, task: Task) -> tuple[Tensor, Metrics]:
        return inner_loop_loss(self, model, params, task)


SHAPE = (1, 16, 16)


def model_of(
    batch_norm: Any, name: str = "conv4", settings: dict[str, Any] | None = None
) -> tuple[Model, Params]:
    shape = (3, 16, 16) if name == "resnet12" else SHAPE
    spec = BackboneSpec(name=name, settings=settings or {"width": 8}, image_shape=shape)
    return build_model(spec, batch_norm), init_params(spec, 0)


@every_engine
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_quadratic_matches_the_closed_form(
    engine: Engine, num_steps: int, first_order: bool
) -> None:
    """phi_K - c = s^K (w - c) with s = 1 - r a. Second order: dphi_K/dw = s^K and dphi_K/dr =
    -K a s^(K-1) (w - c); first order: dphi_K/dw = 1 and dphi_K/dr = -sum_k a s^k (w - c)."""
    algorithm = Quadratic(num_steps, first_order)
    w, r = 2.0, 0.3
    params = {n: torch.tensor(v, dtype=torch.float64) for n, v in (("w", w), ("rate", r))}
    centres = [(0.4, -0.6), (-1.1, 0.3), (2.5, 1.5)]
    nothing = torch.zeros(1, dtype=torch.int64)
    tasks = [
        Task(
            torch.tensor([c], dtype=torch.float64),
            nothing,
            torch.tensor([d], dtype=torch.float64),
            nothing,
            1,
        )
        for c, d in centres
    ]
    model, _ = model_of("running")
    found = meta_gradient(cast(Algorithm, algorithm), model, params, tasks, engine)
    s, a, b = 1 - r * algorithm.a, algorithm.a, algorithm.b
    slope_w = slope_r = 0.0
    for c, d in centres:
        error = b * (c + s**num_steps * (w - c) - d)
        slope_w += error * (1.0 if first_order else s**num_steps)
        powers = [s**k for k in range(num_steps)] if first_order else []
        repeated = sum(powers) if first_order else num_steps * s ** (num_steps - 1)
        slope_r -= error * a * repeated * (w - c)
    assert found.gradient["w"].item() == pytest.approx(slope_w, rel=1e-12)
    assert found.gradient["rate"].item() == pytest.approx(slope_r, rel=1e-12)
    assert found.metrics["loss"].shape == (3,)


def tasks_for(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Task]:
    generator = torch.Generator().manual_seed(1)
    return [
        Task(
            torch.randn(6, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.arange(3).repeat(2),
            torch.randn(9, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.arange(3).repeat(3),
            3,
        )
        for _ in range(3)
    ]


def compute(
    algorithm: MAML | ProtoNet,
    engine: Engine,
    dtype: torch.dtype,
    name: str = "conv4",
    settings: dict[str, Any] | None = None,
) -> GroupGradient:
    model, features = model_of(algorithm.batch_norm, name, settings)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {n: p.to(dtype) for n, p in {**features, **own}.items()}
    shape = (3, 16, 16) if name == "resnet12" else SHAPE
    return meta_gradient(algorithm, model, params, tasks_for(shape, dtype), engine)


def relative_error(found: GroupGradient, wanted: GroupGradient) -> float:
    def vector(result: GroupGradient) -> Tensor:
        parts = [result.gradient[n].double().flatten() for n in sorted(result.gradient)]
        return torch.cat(parts)

    return float((vector(found) - vector(wanted)).norm() / vector(wanted).norm())


ALGORITHMS: list[MAML | ProtoNet] = [
    *(
        MAML(num_inner_steps=3, batch_norm=mode, first_order=first)  # type: ignore[arg-type]
        for mode in ("transductive", "inductive_support", "running")
        for first in (False, True)
    ),
    *(ProtoNet(batch_norm=mode) for mode in ("inductive_support", "running")),  # type: ignore[arg-type]
]
BACKBONES = [
    ("conv4", {"width": 8}),
    ("mlp", {"hidden": [8, 8]}),
    ("resnet12", {"widths": [4, 4, 8, 8]}),
]


@pytest.mark.parametrize(("name", "settings"), BACKBONES, ids=[n for n, _ in BACKBONES])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_all_strategies_agree_in_float64(
    algorithm: MAML | ProtoNet, name: str, settings: dict[str, Any]
) -> None:
    reference = compute(algorithm, Engine(), torch.float64, name, settings)
    for engine in ENGINES[1:]:
        found = compute(algorithm, engine, torch.float64, name, settings)
        assert relative_error(found, reference) < 1e-10, engine
        for key, values in reference.metrics.items():
            torch.testing.assert_close(found.metrics[key], values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["conv4", "resnet12"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_matrix_products_agree_with_convolutions(
    algorithm: MAML | ProtoNet, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes, on the CPU."""
    settings = dict(BACKBONES)[name]
    reference = compute(algorithm, Engine(), torch.float64, name, settings)
    used: list[bool] = []

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        used.append(True)
        return convolve_each(x, weight)

    monkeypatch.setattr(convolution, "products_win", lambda device_type: True)
    monkeypatch.setattr(convolution, "convolve_each", convolve)
    for engine in (Engine(strategy="vmap"), Engine(strategy="vmap_split", chunk=2, stride=2)):
        found = compute(algorithm, engine, torch.float64, name, settings)
        assert relative_error(found, reference) < 1e-10, engine
    assert bool(used) == isinstance(algorithm, MAML), "a ProtoNet's tasks share their filters"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_all_strategies_agree_in_float32(algorithm: MAML | ProtoNet) -> None:
    reference = compute(algorithm, Engine(), torch.float32)
    for engine in ENGINES[1:]:
        assert relative_error(compute(algorithm, engine, torch.float32), reference) < 1e-5, engine


@pytest.mark.parametrize(("name", "settings"), BACKBONES, ids=[n for n, _ in BACKBONES])
@pytest.mark.parametrize("mode", ["transductive", "inductive_support", "running"])
def test_split_and_loop_give_the_same_bits_one_task_at_a_time(
    mode: Any, name: str, settings: dict[str, Any]
) -> None:
    algorithm = MAML(num_inner_steps=3, batch_norm=mode)
    reference = compute(algorithm, Engine(), torch.float32, name, settings)
    engine = Engine(strategy="split", stride=2)
    found = compute(algorithm, engine, torch.float32, name, settings)
    assert all(torch.equal(g, found.gradient[n]) for n, g in reference.gradient.items())


@pytest.mark.parametrize("algorithm", [MAML(num_inner_steps=2), ProtoNet()], ids=str)
def test_bf16_is_lower_precision_and_no_more(algorithm: MAML | ProtoNet) -> None:
    """bfloat16 keeps 8 bits: each number is off by up to 1/256, and a network adds that up. The
    bound that is promised: a quarter of the gradient's length on a small network."""
    reference = compute(algorithm, Engine(), torch.float32)
    lower = compute(algorithm, Engine(precision="bf16"), torch.float32)
    assert all(g.dtype == torch.float32 for g in lower.gradient.values())
    assert 1e-4 < relative_error(lower, reference) < 0.25


class _Live:
    """Bytes that autograd holds on to, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def take(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


class _Held:
    def __init__(self, tensor: Tensor, live: _Live) -> None:
        self.tensor, self.live, self.bytes = tensor, live, tensor.nbytes
        live.take(self.bytes)

    def __del__(self) -> None:
        self.live.now -= self.bytes


@contextmanager
def measured() -> Iterator[_Live]:
    live = _Live()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, live), lambda held: held.tensor
    ):
        yield live


def live_bytes(strategy: Any, num_steps: int) -> int:
    with measured() as live:
        compute(MAML(num_inner_steps=num_steps), Engine(strategy=strategy), torch.float32)
    return live.most


def test_split_holds_no_more_activations_for_more_inner_steps() -> None:
    assert live_bytes("split", 24) == live_bytes("split", 2)
    assert live_bytes("loop", 24) > 6 * live_bytes("loop", 2)
    assert 5 * live_bytes("split", 24) < live_bytes("loop", 24)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tensor_cores_are_allowed_where_they_are_asked_for_and_only_there(precision: Any) -> None:
    """Flags of a GPU's libraries, which a CPU's build keeps too; they are as different as can be."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32, products.allow_tf32 = True, False
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, statistics: Any) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append((convolutions.allow_tf32, products.allow_tf32))
            if len(seen) == 2:
                raise KeyError("something fails")
            return x.flatten(1), {}

    model = replace(model_of("transductive")[0], skeleton=Watching())
    with pytest.raises(KeyError):
        tasks = tasks_for(SHAPE, torch.float32)
        meta_gradient(
            ProtoNet(batch_norm="transductive"), model, {}, tasks, Engine(precision=precision)
        )
    after = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32, products.allow_tf32 = before
    assert seen == [(precision != "fp32",) * 2] * 2
    assert after == (True, False)


def test_no_task_and_unequal_tasks_are_refused() -> None:
    algorithm = ProtoNet()
    model, params = model_of("running")
    with pytest.raises(ValueError, match="at least one task"):
        meta_gradient(algorithm, model, params, [])
    one, other = tasks_for(SHAPE, torch.float32)[:2]
    with pytest.raises(ValueError, match="tasks of one group share"):
        uneven = [one, other._replace(query_x=other.query_x[:3], query_y=other.query_y[:3])]
        meta_gradient(algorithm, model, params, uneven, Engine(strategy="vmap"))
