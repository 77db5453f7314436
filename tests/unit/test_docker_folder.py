"""What `mlflow models build-docker` would put into an image stands on its own feet and answers.

Docker itself is not needed: MLflow builds its image from the folder that `generate-dockerfile` makes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.core.files import MANIFEST, sha256_file
from pipeline.deploy.bundle import load_bundle
from pipeline.deploy.copying import copy_to
from pipeline.deploy.packing import requirements
from pipeline.deploy.registry import Registry
from pipeline.deploy.request import answer, parse_request
from tests.unit.test_copying import GOOD
from tests.unit.test_registry import EXAMPLE
from tests.unit.tiny_learner import tiny_bundle

LOAD = """
import importlib.util, json, sys
# Packages of ours that the model's requirements do not name: an image does not have them.
for name in ("typer", "rich", "psutil", "dvc", "matplotlib", "fontTools", "ray", "onnx"):
    sys.modules[name] = None
# Nor the installation of this repository.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
folder, example, answers = sys.argv[1:]
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(folder)
import pipeline
assert importlib.util.find_spec("stages") is None, "the repository is here"
given = model.predict(json.loads(open(example).read()))
found = {"code": pipeline.__file__, "answers": [one.model_dump(mode="json") for one in given]}
with open(answers, "w") as file:
    json.dump(found, file)
"""


def run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    line = [sys.executable, *arguments]
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def generated(registry: Registry, name: str) -> Path:
    root = registry._root
    target = root / f"image-of-{name}"
    uri = f"models:/{name}@champion"
    command = ("-m", "mlflow", "models", "generate-dockerfile", "-m", uri, "-d", str(target))
    done = run(root, *command, MLFLOW_TRACKING_URI=registry.uri)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("docker")
        registry = Registry(root, "toy-docker")
        version, _ = registry.register(tiny_bundle(root), EXAMPLE, tags=GOOD)
        registry.promote(version)
        copy_to(registry, version, Registry(root, "toy-docker-prod"))
        yield registry


@pytest.fixture(scope="module")
def image(registry: Registry) -> Path:
    return generated(registry, "toy-docker")


def test_the_dockerfile_installs_what_the_bundle_was_made_with(image: Path) -> None:
    """This Python, the pinned MLflow, and the model with its own requirements."""
    lines = (image / "Dockerfile").read_text().splitlines()
    assert f"FROM python:{platform.python_version()}-slim" in lines
    pins = requirements()
    assert [line for line in pins if line.startswith("mlflow==")] == [
        line.removeprefix("RUN pip install ") for line in lines if "pip install" in line
    ]
    assert "COPY model_dir /opt/ml/model" in lines
    assert any("_install_pyfunc_deps('/opt/ml/model'" in line for line in lines)
    assert lines[-1].startswith("ENTRYPOINT") and "C._serve" in lines[-1]
    model = image / "model_dir"
    assert (model / "requirements.txt").read_text().split() == pins
    environment = yaml.safe_load((model / "python_env.yaml").read_text())
    assert environment["python"] == platform.python_version()
    assert environment["dependencies"] == ["-r requirements.txt"]
    conda = yaml.safe_load((model / "conda.yaml").read_text())
    assert conda["dependencies"][-1]["pip"] == pins
    assert not [path for path in model.rglob("*") if path.suffix in {".pkl", ".pyc"}]


def test_the_bundle_in_it_is_the_registered_one(registry: Registry, image: Path) -> None:
    champion = registry.champion()
    assert champion is not None
    bundle = image / "model_dir" / "artifacts" / "bundle"
    assert load_bundle(bundle, digest=champion.digest).digest == sha256_file(bundle / MANIFEST)
    described = yaml.safe_load((image / "model_dir" / "MLmodel").read_text())
    assert described["metadata"]["bundle"] == champion.digest


def answers(image: Path, scratch: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """From a process that has neither this repository nor packages that an image lacks."""
    script, example, told = (scratch / name for name in ("load.py", "example.json", "told.json"))
    script.write_text(LOAD)
    example.write_text(json.dumps(EXAMPLE))
    return run(scratch, str(script), str(image / "model_dir"), str(example), str(told)), told


def test_it_answers_far_from_the_repository(image: Path, tmp_path: Path) -> None:
    done, told = answers(image, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(told.read_text())
    assert Path(found["code"]).is_relative_to(image / "model_dir" / "code")
    learner = load_bundle(image / "model_dir" / "artifacts" / "bundle").learner
    wanted = answer(learner, parse_request(EXAMPLE[0])).model_dump(mode="json")
    (ours,) = found["answers"]
    assert (ours["labels"], ours["classes"]) == (wanted["labels"], wanted["classes"])
    np.testing.assert_allclose(ours["probabilities"], wanted["probabilities"], rtol=1e-5)


def test_a_version_that_was_taken_on_gives_the_same_image(registry: Registry, image: Path) -> None:
    """But for its name in MLflow's own note."""
    other = generated(registry, "toy-docker-prod")
    note = Path("model_dir/registered_model_meta")
    assert "toy-docker-prod" in (other / note).read_text()
    files, others = (
        {p.relative_to(top): sha256_file(p) for p in top.rglob("*") if p.is_file()}
        for top in (image, other)
    )
    assert {k: v for k, v in files.items() if k != note} == {
        k: v for k, v in others.items() if k != note
    }


@pytest.mark.slow
def test_altered_weights_do_not_start(image: Path, tmp_path: Path) -> None:
    weights = image / "model_dir" / "artifacts" / "bundle" / "weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(bytes([*before[:-1], before[-1] ^ 1]))
    try:
        done, told = answers(image, tmp_path)
    finally:
        weights.write_bytes(before)
    assert done.returncode != 0 and "SHA-256" in done.stderr and not told.exists()
