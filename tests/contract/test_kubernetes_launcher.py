"""The launcher `kubernetes`: its own promises, beside those of the battery."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.kube.kinds import RAY_JOBS, TRAIN
from pipeline.core.errors import ConfigError, DataError, MachineError, StoppedError, TrainingError
from pipeline.launch import workspace
from pipeline.launch.base import Job
from pipeline.launch.kubernetes_entry import progress_in
from pipeline.launch.live import Live, append_points
from pipeline.launch.workspace import Packed, pack, place, unpack
from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.runtime.storage import Storage
from pipeline.store.reader import Store, open_store
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.meta_train import run as run_meta_training
from tests.cluster.conftest import cluster_folder, needs, s3
from tests.contract.drive import drive, outcome, start
from tests.distributed.entries import Plan
from tests.distributed.small_run import digest, make_job, write_pretrained
from tests.infra.kube_cluster import eventually
from tests.infra.ray_cluster import TrainingCluster, training

__all__ = ["cluster_folder", "s3", "training"]
ENTRIES = "tests.distributed.entries"
META_TRAIN = "pipeline.training.meta_train:run"
with_ray = pytest.mark.cluster


def own_jobs(training: TrainingCluster) -> list[dict[str, Any]]:
    return [i for i in training.kube.select(RAY_JOBS) if i["metadata"]["name"] != TRAIN]


def stored(training: TrainingCluster, under: str) -> list[str]:
    return sorted(Storage(training.environment["METALOOM_STORAGE"]).folders(under))


@pytest.fixture
def clone(
    tmp_path: Path, blob_store: Store, blob_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder as `dvc repro` has it; all paths of its job are relative."""
    folder = tmp_path / "clone"
    shutil.copytree(blob_store.folder, folder / "data/store/blobs")
    shutil.copytree(blob_tasks, folder / "data/tasks")
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_text("meta_train: {}\n")
    write_pretrained(open_store(Path("data/store/blobs")), Path("models/pretrained/mlp"))
    return folder


def relative_job(clone: Path, num_steps: int = 12, target: str = "models/meta") -> MetaTrainJob:
    """As stage meta_train makes it."""
    made = make_job(
        clone, open_store(Path("data/store/blobs")), Path("data/tasks"), num_steps=num_steps
    )
    return made.model_copy(
        update={
            "store": Path("data/store/blobs"),
            "tasks": Path("data/tasks"),
            "pretrained": Path("models/pretrained/mlp"),
            "target": Path(target),
            "checkpoints": Path(".metaloom/checkpoints/meta_train-0123"),
            "journal": Path(".metaloom/journal/meta_train.jsonl"),
            "choices": Path(".metaloom/engine.json"),
            "incidents": Path(".metaloom/incidents"),
        }
    )


def launched(job: MetaTrainJob, **changes: Any) -> Job:
    return Job(META_TRAIN, job, 2, outputs=(job.target,), max_restarts=3)._replace(**changes)


# What travels


def test_a_job_travels_with_all_that_it_needs(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage((tmp_path / "store").as_uri())
    job = launched(relative_job(clone))
    packed = pack(job, storage)
    pod = tmp_path / "pod"
    assert unpack(storage, packed, pod) == job
    for name in ("data/store/blobs", "data/tasks", "models/pretrained/mlp"):
        assert (pod / name / "manifest.json").read_bytes() == (
            clone / name / "manifest.json"
        ).read_bytes()
    assert (pod / "pipeline/launch/worker.py").exists() and (pod / "params.yaml").exists()
    assert not list(pod.rglob("__pycache__")) and not (pod / ".metaloom").exists()


def test_an_image_brings_code_that_is_newer_than_its_own(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The init container runs the image's code, which may not know the job's configuration."""
    storage = Storage((tmp_path / "store").as_uri())
    packed = pack(launched(relative_job(clone)), storage)

    def unknown(name: str) -> None:
        raise AttributeError(f"{name} is not in this image")

    monkeypatch.setattr(workspace, "resolve", unknown)
    monkeypatch.setenv("METALOOM_STORAGE", storage.uri)
    monkeypatch.setenv(workspace.JOB, packed.digest)
    monkeypatch.setattr(sys, "argv", ["workspace", str(tmp_path / "pod")])
    workspace.main()
    assert (tmp_path / "pod/pipeline/launch/worker.py").exists()
    assert (tmp_path / "pod/data/tasks/manifest.json").exists()


def test_the_same_job_has_the_same_name_and_is_sent_once(clone: Path, tmp_path: Path) -> None:
    storage = Storage((tmp_path / "store").as_uri())
    first = pack(launched(relative_job(clone)), storage)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    assert pack(launched(relative_job(clone)), storage) == first
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()
    } == times
    assert pack(launched(relative_job(clone, num_steps=13)), storage) != first
    assert pack(launched(relative_job(clone), num_workers=7), storage) == first, (
        "a driver that comes again on a larger machine finds its job"
    )


@pytest.mark.parametrize("where", ["a mounted disk", pytest.param("S3", marks=pytest.mark.cluster)])
def test_what_a_run_tells_arrives_in_order_through(
    where: str, clone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The journal, the progress and the wish to stop; both sides may begin again."""
    if where == "S3":
        told = request.getfixturevalue("s3").environment
        os.environ.update({k: v for k, v in told.items() if k.startswith("AWS_")})
        storage = Storage(f"{told['METALOOM_S3']}/live-{os.getpid()}")
    else:
        storage = Storage((tmp_path / "store").as_uri())
    packed = pack(launched(relative_job(clone)), storage)
    assert unpack(storage, packed, tmp_path / "pod").entry == META_TRAIN
    pod, driver = Live(storage, packed), Live(storage, packed)
    assert driver.progress() == {} and not pod.asked_to_stop() and not list(driver.take_points())

    def line(step: int) -> bytes:
        return json.dumps({"step": step, "time": 0.0, "metrics": {"loss": 0.5}}).encode() + b"\n"

    pod.send_piece(line(1) + line(2))
    pod.tell_progress({"done": 2})
    assert append_points(driver.take_points(), Path("j.jsonl")) == 2
    Live(storage, packed).send_piece(line(3))  # a second attempt
    driver.ask_to_stop()
    assert append_points(driver.take_points(), Path("j.jsonl")) == 1
    assert [point.step for point, _ in read_points(Path("j.jsonl"))] == [1, 2, 3]
    assert driver.progress() == {"done": 2} and pod.asked_to_stop()
    assert [point.step for point in Live(storage, packed).take_points()] == [1, 2, 3]
    driver.clear()
    assert not pod.asked_to_stop() and pod.progress() == {}


def test_an_altered_input_is_not_given_a_name(clone: Path, tmp_path: Path) -> None:
    from pipeline.core.errors import ArtefactError

    shard = next(Path("data/store/blobs").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(ArtefactError, match="was altered"):
        pack(launched(relative_job(clone)), Storage((tmp_path / "store").as_uri()))


def test_places_in_the_workspace(clone: Path, tmp_path: Path) -> None:
    assert place(Path("data/tasks")) == place(clone / "data/tasks") == "data/tasks"
    outside = place(tmp_path / "elsewhere/data")
    assert outside.startswith(".outside/") and outside.endswith("/data")
    assert place(tmp_path / "other/data") != outside


def test_progress_is_read_from_what_workers_print() -> None:
    line = '(RayTrainWorker pid=7) {"event": "meta-train", "done": 8, "total": 80, "tasks_per_second": 3.5}'
    assert progress_in(line)["done"] == 8
    for other in ("", '{"event": "worker", "rank": 0}', '{"event": "x", "done": 1', "done"):
        assert progress_in(other) == {}


def test_without_an_object_store_nothing_is_asked_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline.launch.kubernetes_job import launch_kubernetes

    monkeypatch.delenv("METALOOM_STORAGE", raising=False)
    with pytest.raises(ConfigError, match="Set METALOOM_STORAGE"):
        launch_kubernetes(Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), 2), tmp_path)


def test_without_a_template_it_says_what_to_apply(
    training: TrainingCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training.kube.delete(RAY_JOBS, TRAIN)
    job = Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), 2)
    with pytest.raises(MachineError, match="no RayJob metaloom-train.*kubectl apply"):
        drive("kubernetes", job, tmp_path, training.environment)


def test_a_queue_of_the_template_decides_when_it_runs(training: TrainingCluster) -> None:
    from pipeline.cluster.kube.ray_jobs import ray_job_of

    template = training.kube.get(RAY_JOBS, TRAIN)
    plain = ray_job_of(template, "metaloom-a", entrypoint="e", environment={}, code="/workspace")
    assert "suspend" not in plain["spec"]
    template["metadata"]["annotations"] = {"metaloom.dev/queue": "gpus"}
    queued = ray_job_of(template, "metaloom-a", entrypoint="e", environment={"A": "b"}, code="/w")
    assert queued["spec"]["suspend"] is True
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    workers = queued["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert {"name": "A", "value": "b"} in workers["initContainers"][0]["env"]
    assert {"name": "PYTHONPATH", "value": "/w"} in workers["containers"][0]["env"]
    assert all(e["name"] != "PYTHONPATH" for e in workers["initContainers"][0]["env"])
    training.kube.create(RAY_JOBS, queued, dry_run=True)


# What runs


@with_ray
@pytest.mark.slow
def test_it_ends_with_the_bits_of_a_plain_call(training: TrainingCluster, clone: Path) -> None:
    """Code, data and outputs travel; so do the journal and the progress."""
    needs("ray")
    plain = relative_job(clone, target="models/plain")
    plain = plain.model_copy(
        update={"checkpoints": Path("plain-checkpoints"), "journal": Path("plain.jsonl")}
    )
    metrics = run_meta_training(plain, SINGLE)
    job = relative_job(clone)
    folder = clone / "drive"
    assert drive("kubernetes", launched(job), folder, training.environment) == metrics
    assert digest(job) == digest(plain)
    pod = training.controller.workspace(0)
    assert (pod / "models/meta").exists()
    assert not (clone / job.checkpoints).exists(), "it ran elsewhere"
    steps = [point.step for point, _ in read_points(job.journal)]
    assert steps and steps == [point.step for point, _ in read_points(Path("plain.jsonl"))]
    assert own_jobs(training) == [] and stored(training, "jobs") == []
    assert '"event": "meta-train protonet"' in (folder / "drive.log").read_text()


@with_ray
@pytest.mark.slow
def test_the_commit_s_own_code_runs(training: TrainingCluster, tmp_path: Path) -> None:
    needs("ray")
    job = Job("tests.infra.entries:where", Plan(rank=0, what=""), 2)
    found = drive("kubernetes", job, tmp_path / "job", training.environment)
    assert Path(found).is_relative_to(training.controller.workspace(0))


@pytest.mark.slow
@with_ray
def test_a_worker_s_own_error_comes_through(training: TrainingCluster, tmp_path: Path) -> None:
    needs("ray")
    job = Job(f"{ENTRIES}:misbehave", Plan(rank=1, what="user error"), 2)
    with pytest.raises(DataError, match=r"^rank 1 met bad data\. Mend it\.$"):
        drive("kubernetes", job, tmp_path, training.environment)
    assert own_jobs(training) == [] and len(training.controller.processes) == 1


def test_waiting_for_gpus_is_said_and_bounded(training: TrainingCluster, tmp_path: Path) -> None:
    training.controller.has_gpus = False
    job = Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), 2)
    environment = {**training.environment, "METALOOM_PENDING_SECONDS": "3"}
    with pytest.raises(
        MachineError, match=r"not started within 3 s: pod \S+: it waits for a free GPU"
    ):
        drive("kubernetes", job, tmp_path, environment)
    assert own_jobs(training) == []


def test_a_stop_while_it_waits_takes_the_job_away(
    training: TrainingCluster, tmp_path: Path
) -> None:
    training.controller.has_gpus = False
    job = Job(f"{ENTRIES}:identify", Plan(rank=0, what=""), 2)
    driver = start("kubernetes", job, tmp_path, training.environment)
    eventually(lambda: own_jobs(training))
    driver.terminate()
    with pytest.raises(StoppedError, match="before the first step, as asked"):
        outcome(driver, tmp_path)
    assert own_jobs(training) == []


@with_ray
@pytest.mark.slow
def test_a_job_that_is_deleted_under_way_resumes(training: TrainingCluster, clone: Path) -> None:
    needs("ray")
    plain = relative_job(clone, num_steps=60, target="models/plain")
    plain = plain.model_copy(update={"checkpoints": Path("plain-checkpoints")})
    metrics = run_meta_training(plain, SINGLE)
    job = relative_job(clone, num_steps=60)
    driver = start("kubernetes", launched(job), clone / "drive", training.environment)
    eventually(lambda: stored(training, f"checkpoints/{job.checkpoints.name}"), 120)
    training.kube.delete(RAY_JOBS, own_jobs(training)[0]["metadata"]["name"])
    with pytest.raises(TrainingError, match="deleted while it ran.*resumes from the last"):
        outcome(driver, clone / "drive")
    assert drive("kubernetes", launched(job), clone / "again", training.environment) == metrics
    assert digest(job) == digest(plain)


@with_ray
def test_a_driver_that_is_killed_finds_its_job_again(
    training: TrainingCluster, clone: Path
) -> None:
    needs("ray")
    plain = relative_job(clone, num_steps=60, target="models/plain")
    plain = plain.model_copy(update={"checkpoints": Path("plain-checkpoints")})
    metrics = run_meta_training(plain, SINGLE)
    job = relative_job(clone, num_steps=60)
    driver = start("kubernetes", launched(job), clone / "drive", training.environment)
    eventually(lambda: training.controller.processes, 60)
    driver.kill()
    driver.wait()
    (before,) = own_jobs(training)
    assert drive("kubernetes", launched(job), clone / "again", training.environment) == metrics
    assert digest(job) == digest(plain)
    assert len(training.controller.processes) == 1, "the same run went on"
    assert before["metadata"]["uid"] and own_jobs(training) == []


@with_ray
@pytest.mark.slow
def test_a_stop_ends_behind_a_checkpoint_and_goes_on(
    training: TrainingCluster, clone: Path
) -> None:
    needs("ray")
    plain = relative_job(clone, num_steps=400, target="models/plain")
    plain = plain.model_copy(update={"checkpoints": Path("plain-checkpoints")})
    metrics = run_meta_training(plain, SINGLE)
    job = relative_job(clone, num_steps=400)
    driver = start("kubernetes", launched(job), clone / "drive", training.environment)
    eventually(lambda: stored(training, f"checkpoints/{job.checkpoints.name}"), 120)
    driver.send_signal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="behind the checkpoint of step"):
        outcome(driver, clone / "drive")
    assert own_jobs(training) == []
    assert drive("kubernetes", launched(job), clone / "again", training.environment) == metrics
    assert digest(job) == digest(plain)


@with_ray
@pytest.mark.slow
def test_a_pod_that_dies_is_made_again(training: TrainingCluster, clone: Path) -> None:
    """KubeRay makes a new cluster; training goes on from the checkpoint in the object store."""
    needs("ray")
    plain = relative_job(clone, num_steps=60, target="models/plain")
    plain = plain.model_copy(update={"checkpoints": Path("plain-checkpoints")})
    metrics = run_meta_training(plain, SINGLE)
    job = relative_job(clone, num_steps=60)
    driver = start("kubernetes", launched(job), clone / "drive", training.environment)
    eventually(lambda: stored(training, f"checkpoints/{job.checkpoints.name}"), 120)
    os.killpg(training.controller.processes[0].pid, signal.SIGKILL)
    assert outcome(driver, clone / "drive") == metrics
    assert digest(job) == digest(plain)
    assert len(training.controller.processes) == 2


def test_a_pod_without_a_job_says_so(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("METALOOM_")}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.launch.workspace", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "METALOOM_JOB" in done.stderr
    assert "Traceback" not in done.stderr
    assert Packed("a").at("spec") == "jobs/a/spec"
