"""The whole pipeline, by DVC, on a slice of the real typefaces, in a fresh clone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.timeout(900)

SLICE: dict[str, Any] = {
    "preprocess.min_examples_per_class": 16,
    "preprocess.glyphs.packages": ["font-roboto", "matplotlib"],
    "sample_tasks.train.ways": 5,
    "sample_tasks.val": {"ways": [5], "shots": [1], "queries": 5, "episodes": 30},
    "sample_tasks.test": {"ways": [3, 5], "shots": [1], "queries": 5, "episodes": 60},
    "pretrain.candidates": ["mlp"],
    "pretrain.mlp.hidden": [64, 32],
    "pretrain.outer.num_steps": 30,
    "pretrain.outer.validate_every": 15,
    "meta_train.outer.num_steps": 20,
    "meta_train.outer.validate_every": 10,
    "meta_train.outer.checkpoint_every": 5,
    "evaluate.example_episodes": 1,
    "deploy.gate.floors": {"glyphs": {"3w1s": 0.4}},
    "deploy.gate.primary": ["3w1s"],
    "deploy.gate.max_calibration_error": 0.5,
    "deploy.gate.max_drops": [0.5, 0.5, 0.5],
}


def environment(folder: Path) -> dict[str, str]:
    """As on a user's machine: the clone's code, its own registry, no telemetry."""
    return {
        **{
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("METALOOM_", "MLFLOW_", "DVC_", "PYTHON"))
        },
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }


def call(folder: Path, *command: str) -> str:
    """Run a command in a clone; its output, or a failure that shows it."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


def commit(folder: Path, message: str) -> None:
    call(folder, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    call(folder, "git", *identity, "commit", "--quiet", "--allow-empty", "-m", message)


def fresh_clone(target: Path) -> Path:
    """The tracked and new files of this working tree as a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, (os.fsdecode(n) for n in listed)):
        if name in ("dvc.lock",) or not (REPOSITORY / name).is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name)
    params = yaml.safe_load((target / "params.yaml").read_text())
    for key, value in SLICE.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            section = section[part]
        if last == "packages":
            value = {name: section[last][name] for name in value}
        section[last] = value
    (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    call(target, "git", "init", "--quiet", "--initial-branch=main")
    commit(target, "slice")
    return target


def output_hashes(folder: Path) -> dict[str, str]:
    """DVC's hash of every cached output, by path, apart from the release's record."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {
        out["path"]: out["md5"]
        for name, stage in stages.items()
        for out in stage["outs"]
        if name != "deploy"
    }


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def set_steps(folder: Path, steps: int) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["meta_train"]["outer"]["num_steps"] = steps
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run once."""
    folder = fresh_clone(tmp_path_factory.mktemp("e2e") / "clone")
    assert ran(call(folder, "dvc", "repro")) == [
        "preprocess",
        "sample_tasks",
        "pretrain@mlp",
        "meta_train",
        "evaluate",
        "deploy",
    ]
    return folder


def test_the_first_model_is_registered_tried_and_promoted(clone: Path) -> None:
    release = json.loads((clone / "results/deploy/release.json").read_text())
    assert release["decision"]["verdict"] == "champion"
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())["glyphs"]
    assert set(metrics) == {"3w1s", "5w1s"}
    for setting, found in metrics.items():
        assert 1 / int(setting[0]) < found["accuracy"] <= 1
        assert set(found["baselines"]) == {"pixels", "untrained", "pretrained"}
        assert found["protocol"]["split_hash"]
    text = call(clone, "metaloom", "release")
    assert "champion" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_second_repro_runs_nothing(clone: Path) -> None:
    assert ran(call(clone, "dvc", "repro")) == []


@pytest.mark.slow
def test_an_old_parameter_restores_the_old_result(clone: Path) -> None:
    before = output_hashes(clone)
    set_steps(clone, 10)
    assert ran(call(clone, "dvc", "repro"))[:2] == ["meta_train", "evaluate"]
    assert output_hashes(clone) != before
    set_steps(clone, SLICE["meta_train.outer.num_steps"])
    back = call(clone, "dvc", "repro")
    assert set(ran(back)) <= {"deploy"}
    assert "'meta_train' is cached" in back
    assert output_hashes(clone) == before
    links = {stage: run for tags in restored(clone) for stage, run in tags.items()}
    assert {"meta_train", "evaluate"} <= set(links)
    assert "unknown" not in links.values()


def restored(folder: Path) -> list[dict[str, str]]:
    """For each pipeline run, oldest first: the runs that made what DVC restored, by stage."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs(
        [client.get_experiment_by_name("metaloom").experiment_id], order_by=["start_time ASC"]
    )
    prefix = "restored."
    return [
        {k.removeprefix(prefix): v for k, v in run.data.tags.items() if k.startswith(prefix)}
        for run in found
    ]


@pytest.mark.slow
def test_two_clones_of_one_commit_make_the_same_bytes(clone: Path, tmp_path: Path) -> None:
    call(tmp_path, "git", "clone", "--quiet", str(clone), str(tmp_path / "other"))
    other = tmp_path / "other"
    (other / "dvc.lock").unlink(missing_ok=True)
    call(other, "dvc", "repro", "evaluate")
    assert output_hashes(other) == output_hashes(clone)


@pytest.mark.slow
def test_a_version_is_reproduced_from_its_record_alone(clone: Path) -> None:
    """By other numbers of workers, and though a cache holds every result; MLflow is only read."""
    runs = count_runs(clone)
    done = reproduced(clone, METALOOM_NUM_WORKERS="3")
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout)
    assert found["verdict"] == "identical"
    assert found["weights"]["here"] == found["weights"]["recorded"]
    stages = ["preprocess", "sample_tasks", "pretrain@mlp", "meta_train"]
    assert ran(done.stderr) == stages
    assert count_runs(clone) == runs


def test_another_kind_of_machine_is_told_and_nothing_is_computed(clone: Path) -> None:
    done = reproduced(clone, ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 3, done.stderr[-6000:]
    found = json.loads(done.stdout)
    assert found["verdict"] == "fingerprint differs"
    assert [one.split(":")[0] for one in found["differs"]] == ["cpu_capability"]
    assert found["weights"]["here"] is None
    assert ran(done.stderr) == []


def reproduced(clone: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["metaloom", "reproduce", "1", "--json"],
        cwd=clone,
        env={**environment(clone), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def count_runs(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return int(database.execute("SELECT COUNT(*) FROM runs").fetchone()[0])


@pytest.mark.slow
def test_another_algorithm_is_one_setting(clone: Path) -> None:
    commit(clone, "results")
    call(clone, "dvc", "exp", "run", "-S", "meta_train.algorithm.name=maml", "evaluate")
    card = json.loads((clone / "models/meta/learner.json").read_text())
    assert card["algorithm"] == "maml"
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())["glyphs"]
    assert metrics["3w1s"]["protocol"]["batch_norm"] == "inductive_support"
