"""Learners share one copy of the weights and notice nothing of each other (S9)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.algorithms.base import Adapted, Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.deploy.bundle import Bundle, load_bundle, make_bundle
from pipeline.deploy.serve.desk import Desk, Job
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Answers, Pictures, Ready, Version
from pipeline.engine.learner import Learner, Preprocessing
from tests.serve.asking import http, queries, support
from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import NUMBERS, SHAPE, picture, save

ALGORITHMS: dict[str, Algorithm] = {
    "protonet": ProtoNet(),
    "maml": MAML(num_inner_steps=3, inner_lr=0.05),
}
WIDTH = 17  # no multiple of a vector register: rows of a shared pass lie anywhere in memory
CROWD = 16
RATES = {"requests_per_second": 10_000.0, "burst": 100_000}


MLP = BackboneSpec(name="mlp", settings={"hidden": [WIDTH]}, image_shape=SHAPE)
CONV4 = BackboneSpec(name="conv4", settings={"width": 16}, image_shape=(1, 28, 28))


def small_learner(algorithm: Algorithm, spec: BackboneSpec = MLP) -> Learner:
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {**init_params(spec, 0), **own}
    if algorithm.batch_norm == "running":
        noise = torch.randn(64, *spec.image_shape, generator=torch.Generator().manual_seed(1))
        model = model.with_statistics(model.features(params, noise)[1])
    preprocessing = Preprocessing(image_shape=spec.image_shape, mean=[0.5], std=[0.25])
    return Learner(algorithm, model, params, preprocessing, spec, {"stage": "test"})


@pytest.fixture(scope="module", params=sorted(ALGORITHMS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    learner = save(folder / "learner", small_learner(ALGORITHMS[request.param]))
    return make_bundle(folder / "bundle", learner, NUMBERS, domain="toy", card="# A card\n")


@pytest.fixture(scope="module")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("isolation")
    with ServiceProcess(folder, str(bundle.folder), rates=RATES) as one:
        yield one


@pytest.fixture(scope="module")
def web(service: ServiceProcess) -> Iterator[httpx.Client]:
    with http(service, service.key()) as one:
        yield one


def episodes(count: int) -> list[dict[str, Any]]:
    """Of every size, so that requests share passes in ever other ways."""
    rng = np.random.default_rng(0)
    return [
        {
            "support": support(int(rng.integers(2, 6)), int(rng.integers(1, 5)), seed=i),
            "queries": queries(int(rng.integers(1, 9)), seed=3000 + i),
        }
        for i in range(count)
    ]


def answered(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.text


def test_an_answer_is_the_same_alone_and_in_a_crowd(web: httpx.Client) -> None:
    """As JSON text, which holds every bit of every probability."""
    wanted = episodes(60)

    def ask(body: dict[str, Any]) -> str:
        return answered(web.post("/v1/predict", json=body))

    alone = [ask(one) for one in wanted]
    with ThreadPoolExecutor(CROWD) as pool:
        crowded = list(pool.map(ask, wanted * 3))
    assert crowded == alone * 3


def test_a_kept_learner_answers_the_same_whoever_else_asks(web: httpx.Client) -> None:
    wanted = episodes(20)
    taught = [web.post("/v1/learners", json={"support": one["support"]}) for one in wanted]
    paths = [f"/v1/learners/{one.json()['id']}/predict" for one in taught]
    bodies = [{"queries": one["queries"]} for one in wanted]

    def ask(number: int) -> str:
        return answered(web.post(paths[number], json=bodies[number]))

    alone = [ask(i) for i in range(20)]
    with ThreadPoolExecutor(CROWD) as pool:
        crowded = list(pool.map(ask, [*range(20)] * 4))
    assert crowded == alone * 4
    for text, one in zip(alone, wanted, strict=True):
        at_once = web.post("/v1/predict", json=one).json()["predictions"]
        assert at_once == httpx.Response(200, text=text).json()["predictions"]


def test_learners_made_in_a_crowd_are_those_made_alone(
    service: ServiceProcess, web: httpx.Client
) -> None:
    """Their exported tensors too: the zips are the same but for when they were made."""
    wanted = episodes(12)
    with http(service, service.key(owner="alone")) as alone:
        one_by_one = [_tensors(alone, one) for one in wanted]
    with http(service, service.key(owner="crowd")) as crowd, ThreadPoolExecutor(CROWD) as pool:
        assert list(pool.map(lambda one: _tensors(crowd, one), wanted)) == one_by_one


def _tensors(web: httpx.Client, one: dict[str, Any]) -> bytes:
    name = web.post("/v1/learners", json={"support": one["support"]}).json()["id"]
    with zipfile.ZipFile(io.BytesIO(web.get(f"/v1/learners/{name}/export").content)) as packed:
        return packed.read("tensors.safetensors")


def test_an_exported_learner_answers_as_it_does_here(web: httpx.Client, bundle: Bundle) -> None:
    """By its tensors and the model alone."""
    one = {"support": support(ways=3, seed=1), "queries": queries(5, seed=4000)}
    answer = web.post("/v1/predict", json=one).json()["predictions"]
    tensors = safetensors.torch.load(_tensors(web, one))

    def below(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    adapted = Adapted(below("adapted/"), below("statistics/") or bundle.learner.model.statistics)
    pictures = np.stack([picture(4000 + i)[None] for i in range(5)])
    logits = bundle.learner.logits(adapted, pictures)
    for told, expected in zip(answer, (logits / bundle.temperature).softmax(dim=-1), strict=True):
        found = {p["label"]: p["probability"] for p in told["probabilities"]}
        assert [found[f"class {i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


def digest(learner: Learner) -> str:
    """Of every weight and every statistic, in memory."""
    statistics = learner.model.statistics or {}
    found = hashlib.sha256()
    for name, value in sorted({**learner.params, **statistics}.items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_hundreds_of_adaptations_leave_the_weights_as_they_were(bundle: Bundle) -> None:
    """In this process, where the weights can be looked at: the desk and the version as served."""
    fresh = load_bundle(bundle.folder)
    version = Version(ModelRef(name="x", version=None, bundle=bundle.digest), fresh, 16)
    before = digest(version.learner)
    pictures = np.random.default_rng(0).integers(0, 256, (300, 6, *SHAPE), dtype=np.uint8)

    async def teach() -> list[Ready]:
        def job(number: int) -> Job:
            own = pictures[number]
            return Job(version, own, lambda f: version.learn(own, [0, 1, 2] * 2, 3, f))

        return await asyncio.gather(*(desk.do(job(i)) for i in range(300)))

    desk = Desk(most_waiting=1000, threads=1)
    desk.start()
    learned = asyncio.run(teach())
    desk.stop()
    assert digest(version.learner) == before == digest(load_bundle(bundle.folder).learner)
    for number in (0, 150, 299):
        again = version.learn(pictures[number], [0, 1, 2] * 2, 3)
        for name, value in again.adapted.tensors.items():
            assert torch.equal(value, learned[number].adapted.tensors[name])
    ours = {value.data_ptr() for value in version.learner.params.values()}
    for one in learned:  # a learner that is written to would otherwise write into the model
        shared = [n for n, v in one.adapted.tensors.items() if v.data_ptr() in ours]
        assert not shared, shared


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_passes_side_by_side_give_the_bits_of_one_after_another(name: str, tmp_path: Path) -> None:
    """A skeleton that two threads shared would hold the weights of the one in the other's pass."""
    learner = save(tmp_path / "learner", small_learner(ALGORITHMS[name], CONV4))
    bundle = make_bundle(tmp_path / "bundle", learner, NUMBERS, domain="toy", card="# A card\n")
    version = Version(ModelRef(name="x", version=None, bundle=bundle.digest), bundle, 16)
    pictures = np.random.default_rng(0).integers(0, 256, (60, 8, *CONV4.image_shape), np.uint8)

    def learn_and_answer(own: Pictures, features: torch.Tensor | None) -> Answers:
        first, last = (None, None) if features is None else (features[:6], features[6:])
        ready = version.learn(own[:6], [0, 1, 2] * 2, 3, first)
        return version.answer(ready, own[6:], last)

    async def answers(desk: Desk) -> list[Answers]:
        jobs = [Job(version, own, partial(learn_and_answer, own)) for own in pictures]
        return await asyncio.gather(*map(desk.do, jobs))

    found = []
    for passes in (1, 2, 3):
        desk = Desk(most_waiting=100, threads=1, passes=passes)
        desk.start()
        found.append(asyncio.run(answers(desk)))
        desk.stop()
    for one_by_one, *others in zip(*found, strict=True):
        for one in others:
            assert torch.equal(one.probabilities, one_by_one.probabilities)
            assert torch.equal(one.similarity, one_by_one.similarity)
