"""One battery for every row of the algorithm table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.algorithms.table import ALGORITHMS, AlgorithmConfig
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.files import new_folder
from pipeline.core.types import Task
from pipeline.engine.learner import Learner, Preprocessing, load_learner, save_learner
from pipeline.engine.meta_gradient import meta_gradient

SHAPE = (1, 16, 16)
CONTRACT: list[tuple[str, Algorithm]] = [
    ("protonet", ProtoNet()),
    ("protonet", ProtoNet(batch_norm="inductive_support")),
    ("maml", MAML(num_inner_steps=25, inner_lr=0.2)),
    ("maml", MAML(num_inner_steps=25, inner_lr=0.2, first_order=True)),
    ("nearest_centroid", NearestCentroid()),
    ("nearest_centroid", NearestCentroid(metric="euclidean", batch_norm="inductive_support")),
]
every = pytest.mark.parametrize(
    ("name", "algorithm"), CONTRACT, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CONTRACT)]
)


def test_the_battery_is_complete() -> None:
    assert {name for name, _ in CONTRACT} == set(ALGORITHMS)
    assert set(AlgorithmConfig.model_fields) == {"name", *ALGORITHMS}
    for name, algorithm in CONTRACT:
        assert type(algorithm) is ALGORITHMS[name]
        assert isinstance(algorithm, Algorithm)
        assert type(AlgorithmConfig(name=name).chosen()) is ALGORITHMS[name]  # type: ignore[arg-type]


def learner(algorithm: Algorithm) -> Learner:
    backbone = BackboneSpec(name="conv4", settings={"width": 16}, image_shape=SHAPE)
    model = build_model(backbone, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {**init_params(backbone, 0), **own}
    preprocessing = Preprocessing(image_shape=SHAPE, mean=[0.5], std=[0.25])
    if algorithm.batch_norm == "running":
        some = preprocessing(blobs(8, 4)[0])
        model = model.with_statistics(model.features(params, some)[1])
    return Learner(algorithm, model, params, preprocessing, backbone, {"made": "here"})


def blobs(ways: int, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures of `ways` well separated classes, [ways * each, 1, 16, 16], and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(0, 256, (ways, 1, *SHAPE), generator=generator).float()
    pictures = centres + 8 * torch.randn(ways, each, *SHAPE, generator=generator)
    labels = torch.arange(ways).repeat_interleave(each)
    return pictures.clamp(0, 255).to(torch.uint8).flatten(0, 1), labels


def split(ways: int, shots: int, queries: int) -> tuple[torch.Tensor, ...]:
    pictures, labels = blobs(ways, shots + queries)
    is_support = torch.arange(len(labels)) % (shots + queries) < shots
    return pictures[is_support], labels[is_support], pictures[~is_support], labels[~is_support]


@every
@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (3, 5), (5, 2)])
def test_it_learns_separable_classes(
    name: str, algorithm: Algorithm, ways: int, shots: int
) -> None:
    support, support_y, query, query_y = split(ways, shots, 6)
    one = learner(algorithm)
    probabilities = one.predict(one.adapt(support, support_y, ways), query)
    assert probabilities.shape == (len(query), ways)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(query)))
    assert (probabilities.argmax(1) == query_y).float().mean() > 0.9


@every
def test_support_order_does_not_matter(name: str, algorithm: Algorithm) -> None:
    support, support_y, query, _ = split(3, 3, 4)
    one = learner(algorithm)
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(5))
    straight = one.predict(one.adapt(support, support_y, 3), query)
    shuffled = one.predict(one.adapt(support[order], support_y[order], 3), query)
    torch.testing.assert_close(straight, shuffled, rtol=1e-3, atol=1e-4)


@every
def test_class_names_do_not_matter(name: str, algorithm: Algorithm) -> None:
    """Renumbering the classes renumbers the answers."""
    support, support_y, query, _ = split(3, 2, 4)
    one = learner(algorithm)
    renumber = torch.tensor([2, 0, 1])
    straight = one.predict(one.adapt(support, support_y, 3), query)
    renamed = one.predict(one.adapt(support, renumber[support_y], 3), query)
    torch.testing.assert_close(renamed[:, renumber], straight, rtol=1e-3, atol=1e-4)


@every
def test_adapting_changes_nothing_shared(name: str, algorithm: Algorithm) -> None:
    support, support_y, query, _ = split(3, 2, 4)
    one = learner(algorithm)
    before = {n: p.clone() for n, p in one.params.items()}
    first = one.adapt(support, support_y, 3)
    alone = one.predict(first, query)
    one.predict(one.adapt(support.flip(0), support_y, 3), query.flip(0))
    assert all(torch.equal(before[n], p) for n, p in one.params.items())
    assert torch.equal(one.predict(first, query), alone)


@every
def test_gradients_are_finite_and_move_the_loss_down(name: str, algorithm: Algorithm) -> None:
    if not algorithm.trainable:
        pytest.skip(f"{name} has nothing to train")
    if isinstance(algorithm, MAML):  # many inner steps make the loss too rough for a straight look
        algorithm = replace(algorithm, num_inner_steps=2)
    support, support_y, query, query_y = split(4, 2, 4)
    one = learner(algorithm)
    inputs = (one.preprocessing(support), support_y, one.preprocessing(query), query_y, 4)
    task, model = Task(*inputs), one.model.with_statistics(None)

    def loss_at(params: dict[str, torch.Tensor]) -> float:
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        return algorithm.task_loss(model, leaves, task)[0].item()

    gradient = meta_gradient(algorithm, model, one.params, [task]).gradient
    assert set(gradient) == set(one.params)
    assert all(torch.isfinite(g).all() for g in gradient.values())
    square = sum(float((g**2).sum()) for g in gradient.values())
    step = 0.001 * loss_at(one.params) / max(square, 1e-12)
    moved = {n: p - step * gradient[n] for n, p in one.params.items()}
    assert loss_at(moved) < loss_at(one.params)


@every
def test_a_saved_learner_answers_with_the_same_bits(
    name: str, algorithm: Algorithm, tmp_path: Path
) -> None:
    support, support_y, query, _ = split(3, 2, 4)
    one = learner(algorithm)
    with new_folder(tmp_path / "learner", kind="learner") as folder:
        save_learner(folder, one)
    two = load_learner(tmp_path / "learner")
    assert (two.algorithm, two.origin, two.backbone) == (algorithm, one.origin, one.backbone)
    answers = [each.predict(each.adapt(support, support_y, 3), query) for each in (one, two)]
    assert torch.equal(*answers)
