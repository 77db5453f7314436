"""Ray's side of a run: the one MLflow run of the driver, results from a node with its own disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.local.processes import members
from infra.local.servers import Server
from pipeline.core.errors import ConfigError, MachineError
from pipeline.launch.base import Job
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.chaos.disturbed import CHECKPOINT_EVERY, ENTRY, Disturbed, long_job, undisturbed
from tests.cluster.conftest import RayCluster, needs
from tests.contract.drive import REPOSITORY, drive, outcome, start
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
    assert sorted(point.step for point in history) == list(range(1, 241))


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
    assert not [*tmp_path.glob("driver/**/step-*"), *tmp_path.glob("nodes/**/step-*")]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_node_without_the_folder_says_so(
    ray_cluster: RayCluster, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    environment = {**ray_cluster.environment, "METALOOM_WORKSPACE": "/no/such/folder"}
    with pytest.raises(ConfigError, match="has no folder /no/such/folder.*METALOOM_WORKSPACE"):
        drive("ray_train", Job(ENTRY, job, 2), tmp_path / "drive", environment)


@pytest.fixture
def lone_head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A cluster of one node, which may die."""
    needs("ray")
    monkeypatch.setenv("METALOOM_CLUSTER_CPUS", "2")
    with tempfile.TemporaryDirectory(prefix="metaloom-lone-") as folder:
        head = Server(name="ray_head", cluster=Path(folder))
        head.start()
        yield head
        head.kill()


def _all(head: Server) -> None:
    head.kill()


def _state_alone(head: Server) -> None:
    """The process that the others ask about each other; the one that would end all is held back."""
    (gcs,) = [p for p in members(head.record) if "gcs_server" in p.name()]
    psutil.Process(head.record.pid).suspend()
    gcs.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [_all, _state_alone])
def test_a_cluster_that_goes_away_is_one_clear_error(
    kill: Callable[[Server], None],
    lone_head: Server,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """The driver neither waits for ever nor shows a traceback."""
    job = long_job(tmp_path / "run", blob_store, blob_tasks, num_steps=100_000)
    run = Disturbed(job, "ray_train", environment=lone_head.environment, max_restarts=3)
    run.start(2)
    assert run.wait_for_steps(2 * CHECKPOINT_EVERY)
    kill(lone_head)
    assert run.driver is not None and run.is_running()
    run.driver.wait(timeout=120)
    if kill is _state_alone:  # the driver gave up by itself, before Ray ended what was left of it
        assert any("raylet" in p.name() for p in members(lone_head.record))
    assert 0 < run.kept() < job.config.outer.num_steps
    with pytest.raises(MachineError, match="cluster.*went away.*resumes from the last checkpoint"):
        run.end()
    assert "Traceback" not in run.log()


LOCAL = """
import json, os, sys
from pathlib import Path

import psutil
from pipeline.core.ray_cluster import ray_cluster

seen = []
for _ in range(2):
    with ray_cluster(show_workers=False) as ray:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        answer = ray.get(ray.remote(lambda: 7).remote())
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        sockets = [s for p in ours for s in p.net_connections("inet") if s.status == "LISTEN"]
        listens = {p.name() for p in ours if p.net_connections("inet")}
        seen.append([answer, token.stat().st_mode & 0o777, sorted(listens), token.read_text()])
        addresses = sorted({s.laddr.ip for s in sockets})
    seen[-1] += [addresses, token.exists(), "RAY_AUTH_TOKEN_PATH" in os.environ]
print(json.dumps(seen))
"""


def _without_ray(home: Path) -> dict[str, str]:
    """This process's environment as a user has it who never used Ray before."""
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}


def test_a_ray_of_our_own_is_closed_to_all_others(tmp_path: Path) -> None:
    """Nothing listens beyond loopback; the token is ours, for us alone, and gone afterwards."""
    needs("ray")
    environment = _without_ray(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for answer, mode, listens, token, addresses, left, known in json.loads(done.stdout):
        assert (answer, mode, left, known) == (7, 0o600, False, False)
        assert len(token) == 64 and {"gcs_server", "raylet"} <= set(listens)
        assert set(addresses) == {"127.0.0.1", "::ffff:127.0.0.1"}
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("told", ["nothing", "no such file", "another token"])
def test_a_cluster_is_not_entered_without_its_token(
    told: str, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """Not even tried where nothing is said of tokens; and no traceback."""
    environment = _without_ray(tmp_path / "home")
    names = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    environment |= {name: ray_cluster.environment[name] for name in names}
    if told == "no such file":
        environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
    if told == "another token":
        environment["RAY_AUTH_TOKEN"] = "0" * 64
    script = "from pipeline.core.ray_cluster import ray_cluster\n"
    script += "from pipeline.core.errors import MachineError\n"
    script += "try:\n    ray_cluster(show_workers=False).__enter__()\n"
    script += "except MachineError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "no Ray cluster could be used at" in done.stdout
    assert told != "nothing" or "no authentication token was found" in done.stdout
    assert "RAY_AUTH_TOKEN" in done.stdout and "RAY_AUTH_MODE=disabled" in done.stdout
