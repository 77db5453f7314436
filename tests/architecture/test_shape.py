"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from pipeline.cluster.retrain.policy import RetrainConfig
from pipeline.core.config import Section
from pipeline.deploy.release import DeployConfig
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.store.build import PreprocessConfig
from pipeline.tasks.plan import SampleTasksConfig
from pipeline.training.meta_train import MetaTrainConfig
from pipeline.training.pretrain import PretrainConfig
from tests.conftest import REPOSITORY

POLICY = "retrain"
"""Of a whole run: no stage reads it."""
SECTIONS: dict[str, type[Section]] = {
    "preprocess": PreprocessConfig,
    "sample_tasks": SampleTasksConfig,
    "pretrain": PretrainConfig,
    "meta_train": MetaTrainConfig,
    "evaluate": EvaluateConfig,
    "deploy": DeployConfig,
    "retrain": RetrainConfig,
}
DVC: dict[str, Any] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
PARAMS: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("pipeline", "stages", cache_dir=None)


def package_folder(module: str) -> str:
    """`pipeline.store.reader` -> `pipeline/store`; a stage is its own file.

    What talks to Kubernetes is apart: a change of how retraining runs need not train anew.
    """
    parts = module.split(".")
    if parts[:3] == ["pipeline", "cluster", "kube"]:
        return "pipeline/cluster/kube"
    return f"stages/{parts[1]}.py" if parts[0] == "stages" else "/".join(parts[:2])


@pytest.mark.parametrize("stage", sorted(set(SECTIONS) - {POLICY}))
def test_a_stage_depends_on_exactly_the_code_that_it_imports(
    stage: str, graph: grimp.ImportGraph
) -> None:
    module = f"stages.{stage}"
    imported = {module, *graph.find_upstream_modules(module)}
    packages = {package_folder(m) for m in imported if m.count(".") >= 1}
    listed = {d for d in DVC["stages"][stage]["deps"] if d.startswith(("pipeline/", "stages/"))}
    assert listed == packages


def test_the_stages_are_the_sections_and_the_modules() -> None:
    modules = {p.stem for p in (REPOSITORY / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(DVC["stages"])
    assert modules | {POLICY} == set(PARAMS) == set(SECTIONS)


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in leaves(value[key], f"{prefix}.{key}").items()}
    return {prefix: value}


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_default_is_written_out(section: str) -> None:
    config = SECTIONS[section].model_validate(PARAMS[section])
    written, known = leaves(PARAMS[section]), leaves(config.model_dump(mode="json"))
    assert set(written) == set(known)


def test_the_schema_is_the_one_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "schema"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (REPOSITORY / "params.schema.json").read_text(), (
        "run: metaloom schema > params.schema.json"
    )


def test_typefaces_are_pinned_where_they_are_installed() -> None:
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().split()
        if "==" in line
    )
    for package, wanted in PARAMS["preprocess"]["glyphs"]["packages"].items():
        assert pins[package] == str(wanted) == version(package)


def test_stages_are_short_and_modules_bounded() -> None:
    for path in (REPOSITORY / "stages").glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path
    for path in (REPOSITORY / "pipeline").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def imports_of(graph: grimp.ImportGraph, package: str) -> set[str]:
    return {m for m in graph.modules if package in graph.find_modules_directly_imported_by(m)}


def test_heavy_libraries_live_in_one_place() -> None:
    graph = grimp.build_graph("pipeline", "stages", include_external_packages=True, cache_dir=None)
    assert imports_of(graph, "mlflow") <= {
        "pipeline.runtime.mlflow_tracker",
        "pipeline.deploy.registry",
        "pipeline.deploy.artefacts",
        "pipeline.deploy.mlflow_model",
    }
    assert imports_of(graph, "dvc") == set()
    with_kubernetes = imports_of(graph, "kubernetes")
    assert with_kubernetes and all("pipeline.cluster.kube." in name for name in with_kubernetes)
    assert not imports_of(graph, "pickle")
    with_ray = imports_of(graph, "ray")
    assert with_ray and all(name.rpartition(".")[2].startswith("ray_") for name in with_ray)
    text = "".join(
        p.read_text()
        for p in (REPOSITORY / "pipeline").rglob("*.py")
        if p.parent.name != "runtime" and not p.name.startswith("torchrun")
    )
    assert "torch.distributed" not in text


BARE = """
import sys
for name in ("mlflow", "ray", "dvc", "PIL", "typer", "rich", "yaml", "psutil", "matplotlib", "fontTools", "kubernetes"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
import pipeline.engine.learner, pipeline.engine.meta_gradient, pipeline.engine.population
import pipeline.training.meta_train, pipeline.training.pretrain, pipeline.evaluation.evaluate
import pipeline.launch.worker
import benchmarks.contest, benchmarks.contestant, benchmarks.report, benchmarks.whole_loop
from pipeline.runtime.logs import progress
sys.stderr.isatty = lambda: True
with progress("bare", total=1, unit="tasks") as bar:
    bar.advance()
"""


def test_training_runs_on_a_bare_machine() -> None:
    """With torch, numpy, pyarrow, pydantic and safetensors alone."""
    subprocess.run([sys.executable, "-c", BARE], check=True, cwd=REPOSITORY)


def test_importing_does_nothing(tmp_path: Path, graph: grimp.ImportGraph) -> None:
    """No folder, file, seed, thread pool or log line comes from an import alone."""
    left_out = {"pipeline.deploy.mlflow_model"}
    if importlib.util.find_spec("ray") is None:
        left_out.add("pipeline.launch.ray_worker")  # runs inside Ray alone
    modules = sorted(m for m in graph.modules if m not in left_out)
    code = (
        f"import importlib, threading\nfor m in {modules}: importlib.import_module(m)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_nothing_names_a_registry_host_or_pickles() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    hosts = re.compile(r"pypi\.(org|python)|pythonhosted|npmjs\.|index-url", re.IGNORECASE)
    for name in filter(None, tracked):
        if name == "tests/architecture/test_shape.py":
            continue
        try:
            text = (REPOSITORY / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        assert not hosts.search(text), name
