"""The golden episode: its answers by the definition are the service's, and other ones are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, seal
from pipeline.deploy.bundle import GOLDEN, Bundle, load_bundle, make_bundle
from pipeline.deploy.golden import Golden, difference, golden_of
from pipeline.deploy.serve import model as serving
from pipeline.deploy.serve.fleet import try_out
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version
from pipeline.engine.learner import Learner, Preprocessing
from tests.unit.tiny_learner import NUMBERS, save, tiny_bundle, tiny_learner

REF = ModelRef(name="toy", version=1, bundle="0" * 64)
SHAPE = (3, 32, 32)


def conv4(algorithm: Algorithm) -> Learner:
    spec = BackboneSpec(name="conv4", settings={"width": 16}, image_shape=SHAPE)
    model = build_model(spec, algorithm.batch_norm)
    params = init_params(spec, 0)
    params |= algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    if algorithm.batch_norm == "running":
        noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
        model = model.with_statistics(model.features(params, noise)[1])
    scaling = Preprocessing(image_shape=SHAPE, mean=[0.5] * 3, std=[0.3] * 3)
    return Learner(algorithm, model, params, scaling, spec, {"stage": "test"})


def bundled(folder: Path, learner: Learner, temperature: float = 1.0) -> Bundle:
    made = save(folder / "learner", learner)
    fitted = {"temperature": temperature}
    return make_bundle(
        folder / "bundle", made, NUMBERS, domain="toy", card="# A card\n", calibration=fitted
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        ProtoNet(),
        ProtoNet(batch_norm="inductive_support"),
        ProtoNet(batch_norm="transductive"),
        MAML(num_inner_steps=2),
        NearestCentroid(),
    ],
    ids=repr,
)
def test_the_service_gives_the_answers_of_the_definition(
    algorithm: Algorithm, tmp_path: Path
) -> None:
    bundle = bundled(tmp_path, conv4(algorithm), temperature=3.0)
    assert bundle.golden is not None
    assert (bundle.golden.similarity is None) == (algorithm.batch_norm == "transductive")
    try_out(Version(REF, bundle, 16))


def test_the_same_learner_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (tiny_bundle(tmp_path / name) for name in "ab")
    assert (first.folder / GOLDEN).read_bytes() == (second.folder / GOLDEN).read_bytes()
    assert golden_of(tiny_learner(0), 1.0) != golden_of(tiny_learner(1), 1.0)


def test_a_program_that_computes_otherwise_is_found_though_no_file_is_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that still tells the classes apart: without its golden episode nobody would know."""
    bundle = bundled(tmp_path, conv4(ProtoNet()))
    honest = serving.Version.embed

    def blurred(self: Version, pictures: serving.Pictures, *others: object) -> torch.Tensor:
        return honest(self, pictures // 8 * 8, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(serving.Version, "embed", blurred)
    with pytest.raises(ArtefactError, match=r"golden episode otherwise .* by 0\.\d+"):
        try_out(Version(REF, bundle, 16))
    try_out(Version(REF, replace(bundle, golden=None), 16))


def test_a_bundle_from_before_there_was_one_is_served(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    (bundle.folder / GOLDEN).unlink()
    (bundle.folder / MANIFEST).unlink()
    seal(bundle.folder, kind="metaloom bundle", format_version=2)
    old = load_bundle(bundle.folder)
    assert old.golden is None
    try_out(Version(REF, old, 16))


@pytest.mark.parametrize("text", ["{}", "[]", '{"probabilities": "x", "similarity": null}'])
def test_something_else_in_its_place_is_refused(text: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    target = tmp_path / "other"
    shutil.copytree(bundle.folder, target)
    (target / GOLDEN).write_text(text)
    (target / MANIFEST).unlink()
    seal(target, kind="metaloom bundle", format_version=2)
    with pytest.raises(ArtefactError, match="is sealed and yet no bundle"):
        load_bundle(target)


def test_what_is_no_number_is_as_far_off_as_can_be() -> None:
    golden = Golden(probabilities=[[0.5, 0.5]], similarity=[[1.0]])
    found = torch.tensor([[torch.nan, 0.5]])
    assert difference(golden, found, torch.ones(1, 1)) == float("inf")
    assert difference(golden, torch.full((1, 2), 0.5), torch.ones(1, 1)) == 0
    assert difference(golden, torch.full((1, 2), 0.5), torch.zeros(1, 1)) == 1
