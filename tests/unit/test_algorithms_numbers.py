"""Each algorithm's numbers against a closed form or a second implementation, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet, prototypes, squared_distances
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.meta_gradient import meta_gradient


def test_prototypes_are_class_means() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(7, 3).double(), torch.tensor([2, 0, 1, 2, 0, 2, 1])
    expected = torch.stack([features[labels == n].mean(0) for n in range(3)])
    torch.testing.assert_close(prototypes(features, labels, 3), expected, rtol=1e-12, atol=1e-12)


def test_distances_match_the_plain_formula() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 4).double(), torch.randn(3, 4).double()
    plain = (a[:, None] - b[None]).pow(2).sum(-1)
    torch.testing.assert_close(squared_distances(a, b), plain, rtol=1e-10, atol=1e-10)


def small_task(ways: int = 3, shots: int = 2, queries: int = 2) -> Task:
    torch.manual_seed(1)
    support_y = torch.arange(ways).repeat_interleave(shots)
    query_y = torch.arange(ways).repeat_interleave(queries)
    x = torch.randn(len(support_y) + len(query_y), 1, 4, 4, dtype=torch.float64)
    return Task(x[: len(support_y)], support_y, x[len(support_y) :], query_y, ways)


def small_model(algorithm: MAML | ProtoNet | NearestCentroid) -> tuple[Model, Params]:
    spec = BackboneSpec(name="mlp", settings={"hidden": [6, 12]}, image_shape=(1, 4, 4))
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    return model, {n: p.double() for n, p in {**init_params(spec, 0), **own}.items()}


@pytest.mark.parametrize(
    "algorithm",
    [MAML(num_inner_steps=2), MAML(batch_norm="transductive"), ProtoNet(), ProtoNet(scale=0.3)],
)
def test_meta_gradients_match_finite_differences(algorithm: MAML | ProtoNet) -> None:
    model, params = small_model(algorithm)
    task = small_task()
    exact = meta_gradient(algorithm, model, params, [task]).gradient
    torch.manual_seed(2)
    for _ in range(3):
        direction = {n: torch.randn_like(p) for n, p in params.items()}
        h = 1e-6
        up = {n: p + h * direction[n] for n, p in params.items()}
        down = {n: p - h * direction[n] for n, p in params.items()}
        with torch.enable_grad():
            losses = [
                algorithm.task_loss(model, {n: p.requires_grad_() for n, p in at.items()}, task)[0]
                for at in (up, down)
            ]
        slope = (losses[0] - losses[1]).item() / (2 * h)
        along = sum((exact[n] * direction[n]).sum().item() for n in params)
        assert along == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_first_order_differs_from_second() -> None:
    model, params = small_model(MAML())
    second, first = (
        meta_gradient(MAML(first_order=flag), model, params, [small_task()]).gradient
        for flag in (False, True)
    )
    assert not torch.allclose(second["backbone.layers.0.weight"], first["backbone.layers.0.weight"])


def test_a_group_is_the_sum_of_its_tasks() -> None:
    algorithm = ProtoNet()
    model, params = small_model(algorithm)
    tasks = [small_task(), small_task(queries=3)]
    both = meta_gradient(algorithm, model, params, tasks)
    one, two = (meta_gradient(algorithm, model, params, [task]) for task in tasks)
    for name, value in both.gradient.items():
        torch.testing.assert_close(value, one.gradient[name] + two.gradient[name])
    assert both.metrics["loss"].tolist() == [*one.metrics["loss"], *two.metrics["loss"]]


def test_what_is_predicted_is_what_was_trained() -> None:
    """With the support set's statistics, task_loss and adapt/predict are the same computation."""
    for algorithm in (MAML(num_inner_steps=2), ProtoNet(batch_norm="inductive_support")):
        model, params = small_model(algorithm)
        task = small_task()
        loss, _ = algorithm.task_loss(
            model, {n: p.requires_grad_() for n, p in params.items()}, task
        )
        adapted = algorithm.adapt(model, params, task.support_x, task.support_y, task.num_ways)
        logits = algorithm.predict(model, params, adapted, task.query_x)
        assert F.cross_entropy(logits, task.query_y).item() == pytest.approx(loss.item(), rel=1e-9)


def test_inductive_queries_do_not_see_each_other_and_transductive_ones_do() -> None:
    def alone_and_together(algorithm: MAML | ProtoNet) -> tuple[Tensor, Tensor]:
        model, params = small_model(algorithm)
        task = small_task()
        adapted = algorithm.adapt(model, params, task.support_x, task.support_y, task.num_ways)
        together = algorithm.predict(model, params, adapted, task.query_x)
        first_half = algorithm.predict(model, params, adapted, task.query_x[:3])
        return first_half, together[:3]

    for algorithm in (MAML(), ProtoNet(batch_norm="inductive_support")):
        torch.testing.assert_close(*alone_and_together(algorithm))
    for algorithm in (MAML(batch_norm="transductive"), ProtoNet(batch_norm="transductive")):
        alone, together = alone_and_together(algorithm)
        assert not torch.allclose(alone, together)


def test_cosine_centroids_match_the_plain_formula() -> None:
    algorithm = NearestCentroid(metric="cosine", scale=3.0, batch_norm="inductive_support")
    model, params = small_model(algorithm)
    task = small_task()
    adapted = algorithm.adapt(model, params, task.support_x, task.support_y, 3)
    logits = algorithm.predict(model, params, adapted, task.query_x)
    support, statistics = model.embed_support(params, task.support_x)
    query = model.embed_query(params, task.query_x, statistics)
    unit = support / support.norm(dim=1, keepdim=True)
    means = torch.stack([unit[task.support_y == n].mean(0) for n in range(3)])
    cosine = F.cosine_similarity(query[:, None], means[None], dim=-1)
    # |q - c|^2 = 2 - 2 cos(q, c) for unit vectors
    torch.testing.assert_close(logits, -3.0 * (2 - 2 * cosine), rtol=1e-8, atol=1e-8)
