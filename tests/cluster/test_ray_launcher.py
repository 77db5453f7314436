"""Ray's side of a run: the one MLflow run of the driver, results from a node with its own disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from infra.local.servers import Server
from pipeline.core.errors import ConfigError
from pipeline.launch.base import Job
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.chaos.disturbed import ENTRY, long_job, undisturbed
from tests.cluster.conftest import RayCluster
from tests.contract.drive import drive, outcome, start
from tests.distributed.small_run import digest

pytestmark = pytest.mark.timeout(600)


def test_the_workers_start_again_and_there_is_one_run(
    ray_cluster: RayCluster, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """A worker is killed; every step is in the driver's run once, and no run is left open."""
    import mlflow

    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    folder, root = tmp_path / "drive", tmp_path / "recorded"
    root.mkdir()
    environment = {
        **ray_cluster.environment,
        "METALOOM_TRACKING": "on",
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
    }
    driver = start(
        "ray_train", Job(ENTRY, job, 2, max_restarts=3), folder, environment, record=root
    )
    log = folder / "drive.log"
    deadline = time.monotonic() + 150
    while len(_logged(root)) < 12:
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    pids = re.findall(r'"rank": 1, "process": (\d+)', log.read_text())
    os.kill(int(pids[-1]), signal.SIGKILL)
    reached = len(_logged(root))
    outcome(driver, folder)
    groups = re.findall(r'"rank": 0, "process": (\d+)', log.read_text())
    assert reached < job.config.outer.num_steps and len(groups) == 2

    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "metaloom"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (stage,) = [run for run in runs if run.data.tags["metaloom.role"] == "stage"]
    history = client.get_metric_history(stage.info.run_id, "loss")
    assert sorted({point.step for point in history}) == list(range(1, 241))


def _logged(root: Path) -> list[int]:
    return [
        point.step
        for journal in root.glob(".metaloom/journal/*.jsonl")
        for point, _ in read_points(journal)
    ]


def _on_its_own_disk(tmp_path: Path, store: Store, tasks: Path) -> MetaTrainJob:
    """A job of relative paths; the data is in the driver's folder and in that of the nodes."""
    for place in ("driver", "nodes"):
        made = long_job(tmp_path / place, store, tasks)
        shutil.copytree(store.folder, tmp_path / place / "store")
        shutil.copytree(tasks, tmp_path / place / "tasks")
    names = ("pretrained", "target", "checkpoints", "journal", "choices", "incidents")
    inside = {
        name: path.relative_to(tmp_path / "nodes") if path.is_absolute() else path
        for name in names
        if (path := getattr(made, name))
    }
    return made.model_copy(update={"store": Path("store"), "tasks": Path("tasks"), **inside})


def test_nodes_with_disks_of_their_own_send_their_results_by_s3(
    ray_cluster: RayCluster,
    s3: Server,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers work in another folder, and do not see the driver's."""
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    job = _on_its_own_disk(tmp_path, blob_store, blob_tasks)
    monkeypatch.chdir(tmp_path / "driver")
    environment = {
        **ray_cluster.environment,
        **s3.environment,
        "METALOOM_WORKSPACE": str(tmp_path / "nodes"),
        "METALOOM_STORAGE": f"{s3.environment['METALOOM_S3']}/{tmp_path.name}",
    }
    request = Job(ENTRY, job, 2, outputs=(job.target,))
    assert drive("ray_train", request, tmp_path / "drive", environment) == metrics
    here = job.model_copy(update={"target": tmp_path / "driver" / job.target})
    assert digest(here) == bits
    assert not (tmp_path / "driver" / "checkpoints").exists()
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    logs = _ray_logs(ray_cluster)
    assert any(job.target.name.encode() in text for text in logs.values()), "they tell of the job"
    for secret in (token, s3.environment["AWS_SECRET_ACCESS_KEY"]):
        assert [path for path, text in logs.items() if secret.encode() in text] == []


def _ray_logs(cluster: RayCluster) -> dict[Path, bytes]:
    """What both nodes have written about all their work."""
    folders = [node.folder / "state" for node in (cluster.head, cluster.node)]
    paths = [path for folder in folders for path in folder.glob("session_*/logs/**/*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_results_that_cannot_come_home_are_refused_by_a_clear_error(
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = _on_its_own_disk(tmp_path, blob_store, blob_tasks)
    monkeypatch.chdir(tmp_path / "driver")
    environment = {
        **ray_cluster.environment,
        "METALOOM_WORKSPACE": str(tmp_path / "nodes"),
    }
    with pytest.raises(ConfigError, match="does not share the driver's folders.*METALOOM_STORAGE"):
        drive("ray_train", Job(ENTRY, job, 2, outputs=(job.target,)), tmp_path / "d", environment)


def test_a_node_without_the_folder_says_so(
    ray_cluster: RayCluster, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    environment = {**ray_cluster.environment, "METALOOM_WORKSPACE": "/no/such/folder"}
    with pytest.raises(ConfigError, match="has no folder /no/such/folder.*METALOOM_WORKSPACE"):
        drive("ray_train", Job(ENTRY, job, 2), tmp_path / "drive", environment)
