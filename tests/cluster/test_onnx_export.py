"""An exported encoder gives the service's features in onnxruntime, or there is no file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BACKBONES, BackboneSpec, build_model, init_params
from pipeline.cli import app
from pipeline.core.errors import ArtefactError, ConfigError, MachineError, RegistryError
from pipeline.deploy import onnx_encoder
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.onnx_encoder import (
    INPUT,
    LIMIT,
    NUM_PICTURES,
    OUTPUT,
    Encoder,
    check,
    difference,
    encode,
    export_encoder,
    made_up_pictures,
)
from pipeline.deploy.registry import PASSED, SMOKE_TAG, Registry
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version
from pipeline.engine.learner import Learner, Preprocessing
from tests.cluster.conftest import needs
from tests.conftest import REPOSITORY
from tests.unit.test_registry import EXAMPLE
from tests.unit.tiny_learner import NUMBERS, save, tiny_bundle

Shape = tuple[int, int, int]
CONTRACT: tuple[tuple[str, dict[str, Any], Shape], ...] = (
    ("conv4", {"width": 16}, (1, 28, 28)),
    ("resnet12", {"widths": [8, 8, 16, 16]}, (3, 32, 32)),
    ("mlp", {"hidden": [32, 16]}, (1, 20, 20)),
    ("pixels", {}, (1, 12, 12)),
)


@pytest.fixture(autouse=True)
def _extra() -> None:
    needs("onnx", "onnxscript", "onnxruntime")


def learner_of(
    name: str, settings: dict[str, Any], shape: Shape, algorithm: Algorithm | None = None
) -> Learner:
    algorithm = algorithm or ProtoNet()
    spec = BackboneSpec(name=name, settings=settings, image_shape=shape)
    model = build_model(spec, algorithm.batch_norm)
    params = init_params(spec, 3)
    params |= algorithm.init(model.feature_dim, torch.Generator().manual_seed(3))
    noise = 2 * torch.randn(64, *shape, generator=torch.Generator().manual_seed(1)) + 0.5
    statistics = model.features(params, noise)[1]
    mean, std = np.linspace(0.3, 0.6, shape[0]).tolist(), np.linspace(0.2, 0.4, shape[0]).tolist()
    preprocessing = Preprocessing(image_shape=shape, mean=mean, std=std)
    model = model.with_statistics(statistics or None)
    return Learner(algorithm, model, params, preprocessing, spec, {"stage": "test"})


def bundle_of(folder: Path, learner: Learner) -> Bundle:
    made = save(folder / "learner", learner)
    return make_bundle(folder / "bundle", made, NUMBERS, domain="toy", card="# A card\n")


Features = Callable[[Any], Any]


def opened(content: bytes) -> tuple[Any, Features]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session, lambda pictures: session.run([OUTPUT], {INPUT: pictures})[0]


def test_every_backbone_is_tried() -> None:
    assert {name for name, _, _ in CONTRACT} == set(BACKBONES)


@pytest.mark.parametrize(("name", "settings", "shape"), CONTRACT)
def test_onnxruntime_gives_the_features_of_the_service(
    name: str, settings: dict[str, Any], shape: Shape, tmp_path: Path
) -> None:
    """For batches of one and of seven, of pictures that the export has not seen."""
    bundle = bundle_of(tmp_path, learner_of(name, settings, shape))
    done = export_encoder(bundle, tmp_path / "new" / "encoder.onnx")
    assert 0 <= done.difference <= LIMIT and done.pictures == NUM_PICTURES
    session, features = opened(done.file.read_bytes())
    version = Version(ModelRef(name="m", version=1, bundle=bundle.digest), bundle, 16)
    for size in (1, 7):
        pictures = np.random.default_rng(size).integers(0, 256, (size, *shape), dtype=np.uint8)
        found, wanted = features(pictures), version.embed(pictures).numpy()
        assert found.dtype == np.float32 and found.shape == (size, bundle.learner.model.feature_dim)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    kept = session.get_modelmeta().custom_metadata_map
    assert kept["metaloom.bundle"] == bundle.digest == done.bundle
    assert kept["metaloom.weights"] == bundle.weights_digest
    assert "uint8" in kept["metaloom.input"] and "no labels" in kept["metaloom.output"]
    assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [
        (INPUT, "tensor(uint8)", list(shape))
    ]
    assert [path.name for path in done.file.parent.iterdir()] == ["encoder.onnx"]


def test_the_same_bundle_gives_the_same_bytes_without_a_trace_of_this_machine(
    tmp_path: Path,
) -> None:
    bundle = bundle_of(tmp_path, learner_of(*CONTRACT[0]))
    content = encode(bundle)
    assert content == encode(bundle)
    for text in (str(REPOSITORY), str(tmp_path), ".py", "site-packages"):
        assert text.encode() not in content, text


def test_an_export_leaves_the_learner_as_it_was(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, learner_of(*CONTRACT[0]))
    pictures = made_up_pictures((1, 28, 28))
    before = bundle.learner.preprocessing(pictures)
    encode(bundle)
    torch.testing.assert_close(bundle.learner.preprocessing(pictures), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "settings", "shape"), CONTRACT[:3])
def test_tampered_weights_are_found(
    name: str, settings: dict[str, Any], shape: Shape, tmp_path: Path
) -> None:
    """A hundredth more in any one weight tensor, in the file as it was written."""
    import onnx

    bundle = bundle_of(tmp_path, learner_of(name, settings, shape))
    content = encode(bundle)
    model = onnx.load_from_string(content)
    names = [one.name for one in model.graph.initializer if len(one.dims) >= 2 and one.dims[0] > 3]
    assert len(names) >= 2
    for tampered in names:
        model = onnx.load_from_string(content)
        for tensor in model.graph.initializer:
            if tensor.name == tampered:
                value = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value * np.float32(1.01), tampered))
        assert difference(model.SerializeToString(), bundle) > LIMIT, tampered
        with pytest.raises(ArtefactError, match="does not give the service's features"):
            check(model.SerializeToString(), bundle)


@pytest.mark.parametrize("wrong", ["weights", "nan", "shape"])
def test_other_features_leave_no_file(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path, learner_of(*CONTRACT[2]))

    def altered(self: Encoder, pictures: torch.Tensor) -> torch.Tensor:
        features = right(self, pictures)
        if wrong == "shape":
            return features[:, :-1]
        return features * (float("nan") if wrong == "nan" else 1.001)

    right = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", altered)
    file = tmp_path / "encoder.onnx"
    for before in (None, b"of yesterday"):
        if before:
            file.write_bytes(before)
        with pytest.raises(ArtefactError, match="more than 1e-04. Nothing was written"):
            export_encoder(bundle, file)
        assert (file.read_bytes() if before else file.exists()) == (before or False)
    assert {path.name for path in tmp_path.iterdir()} == {"learner", "bundle", "encoder.onnx"}


def without_statistics() -> Learner:
    learner = learner_of(*CONTRACT[0])
    return replace(learner, model=learner.model.with_statistics(None))


def by_support_set() -> Learner:
    return learner_of(*CONTRACT[0], algorithm=ProtoNet(batch_norm="inductive_support"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: learner_of(*CONTRACT[0], algorithm=MAML()), "maml on conv4 .* adapts its network"),
        (by_support_set, r"from each episode \(batch_norm: inductive_support\)"),
        (without_statistics, "no measured batch statistics"),
    ],
)
def test_learners_whose_features_depend_on_the_episode_are_refused(
    make: Callable[[], Learner], told: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, make())
    with pytest.raises(ArtefactError, match=f"cannot be exported: it .*|{told}") as caught:
        export_encoder(bundle, tmp_path / "encoder.onnx")
    caught.match(told)
    assert not (tmp_path / "encoder.onnx").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, learner_of(*CONTRACT[3]))
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match="folder cannot be written"):
        export_encoder(bundle, tmp_path / "folder")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_encoder, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(MachineError, match=r"no_such_package not installed.*metaloom\[onnx\]"):
        export_encoder(bundle_of(tmp_path, learner_of(*CONTRACT[3])), tmp_path / "encoder.onnx")


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["export", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered version by number and by alias, and a folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    bundle = tiny_bundle(tmp_path, 0)
    registry, to = Registry(tmp_path, "toy"), ("--onnx", "encoder.onnx", "--model", "toy")
    version, _ = registry.register(bundle, EXAMPLE, tags={SMOKE_TAG: PASSED})
    told = json.loads(command("1", *to, "--json"))
    assert told["bundle"] == bundle.digest and told["origin"] == "models:/toy/1"
    assert told["difference"] <= told["limit"] == LIMIT and told["file"] == "encoder.onnx"
    assert told["input"] == "uint8 [batch, 1, 12, 12]" and told["output"] == "float32 [batch, 16]"
    with pytest.raises(RegistryError, match="there is no models:/toy@champion"):
        command(*to)
    with pytest.raises(RegistryError, match="toy has no version 9"):
        command("9", *to)
    with pytest.raises(ConfigError, match="neither the folder of a bundle"):
        command("a/b", *to)
    registry.promote(version)
    assert "differ by at most" in command(*to)
    by_number = Path("encoder.onnx").read_bytes()
    assert command("models:/toy@champion", *to) and Path("encoder.onnx").read_bytes() == by_number
    assert "uint8 [batch, 1, 12, 12]" in command(str(bundle.folder), *to)


def test_a_refusal_is_one_message(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, learner_of(*CONTRACT[0], algorithm=MAML()))
    line = [sys.executable, "-m", "pipeline.cli", "export", str(bundle.folder), "--onnx", "e.onnx"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: maml on conv4 cannot be exported")
    assert "Traceback" not in done.stderr and not (REPOSITORY / "e.onnx").exists()
