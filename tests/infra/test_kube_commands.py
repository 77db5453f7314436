"""`metaloom cluster ...` as a person types it."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from pipeline.cluster.kube.doctor import examine
from pipeline.cluster.kube.kinds import (
    CANCELLED_NOTE,
    CONFIG_MAPS,
    CRON_JOBS,
    EVENTS,
    JOBS,
    LEASES,
    PODS,
    RAY_JOBS,
    RETRAIN,
    SECRETS,
    SERVICE_ACCOUNTS,
)
from pipeline.cluster.kube.lease import single_flight
from pipeline.cluster.kube.logs import read_logs
from pipeline.cluster.kube.runs import Run, as_table, span
from pipeline.core.errors import PipelineError
from pipeline.runtime.logs import run_main
from tests.infra.api_server.controllers import event_about
from tests.infra.api_server.status import over_quota, unauthorized
from tests.infra.kube_cluster import Cluster, api_server, cluster, eventually, manifest, typed

__all__ = ["api_server", "cluster"]
Command = Callable[..., str]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A git repository with params.yaml; its commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_text("meta_train: {}\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def metaloom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command; what it prints, or SystemExit with its last line of stderr."""

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["metaloom", "cluster", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(app)
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == status, out + err
        assert "Traceback" not in err
        return out if status == 0 else out + err

    return run


@pytest.fixture
def submitted(cluster: Cluster, repository: str, metaloom: Command) -> str:
    """A run that waits for its pod."""
    cluster.apply_retraining()
    told: dict[str, Any] = json.loads(metaloom("submit", "--json"))
    return str(told["run"])


def running(cluster: Cluster, pod: dict[str, Any], exit_code: int | None = None) -> None:
    name = pod["spec"]["containers"][0]["name"]
    state: dict[str, Any] = {"running": {}}
    phase = "Running"
    if exit_code is not None:
        state = {
            "terminated": {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed"}
        }
        phase = "Failed" if exit_code else "Succeeded"
    told = {
        "name": name,
        "ready": exit_code is None,
        "restartCount": 0,
        "image": "metaloom-train",
        "imageID": "",
        "state": state,
    }
    ready = {"type": "Ready", "status": "True" if exit_code is None else "False"}
    cluster.set_status(pod, phase=phase, containerStatuses=[told], conditions=[ready])


def test_a_run_is_the_cron_job_s_own_with_the_commit(
    cluster: Cluster, repository: str, metaloom: Command, submitted: str
) -> None:
    job = cluster.kube.get(JOBS, submitted)
    assert submitted.startswith(f"retrain-{repository[:10]}-") and len(submitted) == 27
    template = manifest("retrain.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    assert job["spec"]["activeDeadlineSeconds"] == template["activeDeadlineSeconds"]
    driver = job["spec"]["template"]["spec"]["containers"][0]
    environment = {e["name"]: e.get("value") for e in driver["env"]}
    assert environment["METALOOM_COMMIT"] == repository
    assert environment["METALOOM_BECAUSE"] == "manual"
    assert environment["METALOOM_LAUNCHER"] == "kubernetes"
    assert driver["args"] == template["template"]["spec"]["containers"][0]["args"]


def test_what_sets_a_run_off_is_told_to_its_driver(
    cluster: Cluster, repository: str, metaloom: Command
) -> None:
    cluster.apply_retraining()
    run = json.loads(metaloom("submit", "--because", "drift", "--json"))["run"]
    job = cluster.kube.get(JOBS, run)
    driver = job["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "METALOOM_BECAUSE", "value": "drift"} in driver["env"]
    assert job["metadata"]["annotations"]["metaloom.dev/because"] == "drift"
    assert "drift" in metaloom("submit", "--because", "moon", status=2)


def test_submitting_twice_is_submitting_once(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    assert "is there already: waiting" in metaloom("submit")
    assert len(cluster.kube.select(JOBS)) == 1
    Path("params.yaml").write_text("meta_train: {seed: 1}\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-qam", "two"], check=True)
    other = json.loads(metaloom("submit", "--json"))
    assert other["new"] and other["run"] != submitted
    assert json.loads(metaloom("submit", "HEAD~1", "--json"))["run"] == submitted


def test_what_has_succeeded_is_submitted_anew_for_new_data_may_have_come(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    running(cluster, cluster.pod(submitted), exit_code=0)
    old = cluster.wait_for_state(submitted, "succeeded")
    assert "would be submitted" in metaloom("submit", "--dry-run=server")
    assert cluster.kube.get(JOBS, submitted) == old
    told = json.loads(metaloom("submit", "--because", "drift", "--json"))
    assert (told["run"], told["new"], told["state"]) == (submitted, True, "waiting")
    new = cluster.kube.get(JOBS, submitted)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert new["metadata"]["annotations"]["metaloom.dev/because"] == "drift"
    assert "is there already: waiting" in metaloom("submit")
    assert cluster.kube.get(JOBS, submitted)["metadata"]["uid"] == new["metadata"]["uid"]


@pytest.mark.parametrize("before", ["nothing", "one that has succeeded"])
def test_two_at_once_submit_one(before: str, cluster: Cluster, repository: str) -> None:
    from pipeline.cluster.kube.retraining import Submitted, submit

    cluster.apply_retraining()
    if before != "nothing":
        run = submit(cluster.kube, repository, "0" * 64).run
        running(cluster, cluster.pod(run), exit_code=0)
        cluster.wait_for_state(run, "succeeded")
    done: list[Submitted] = []
    threads = [
        threading.Thread(target=lambda: done.append(submit(cluster.kube, repository, "0" * 64)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.new for one in done].count(True) == 1 and len({one.run for one in done}) == 1


def test_an_answer_that_is_lost_submits_once(
    cluster: Cluster, repository: str, metaloom: Command
) -> None:
    cluster.apply_retraining()
    server = cluster.ours
    server.lose_answers("create", "jobs", times=1)
    metaloom("submit")
    assert len(cluster.kube.select(JOBS)) == 1


def test_a_dry_run_submits_nothing(cluster: Cluster, repository: str, metaloom: Command) -> None:
    cluster.apply_retraining()
    assert "would be submitted" in metaloom("submit", "--dry-run=server")
    assert cluster.kube.select(JOBS) == []
    assert "--dry-run=client is not known" in metaloom("submit", "--dry-run=client", status=1)


def test_waiting_tells_each_state_and_its_end(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    def fare() -> None:
        pod = cluster.pod(submitted)
        running(cluster, pod)
        time.sleep(1)
        running(cluster, pod, exit_code=0)

    kubelet = threading.Thread(target=fare)
    kubelet.start()
    told = metaloom("submit", "--wait").splitlines()
    kubelet.join()
    assert told[-1] == f"{submitted}: succeeded"
    assert all(line.startswith(f"{submitted}: ") for line in told) and len(told) == len(set(told))


def test_a_failed_run_says_why_and_runs_again_under_its_name(
    cluster: Cluster, repository: str, metaloom: Command, submitted: str
) -> None:
    def fail(number: int) -> None:
        running(cluster, cluster.pod(submitted, number), exit_code=3)

    for number in (1, 2):  # it may be tried again once
        fail(number)
    old = cluster.wait_for_state(submitted, "failed")
    assert "container driver ended with status 3" in metaloom("status")
    assert "failed" in metaloom("submit", "--wait", status=1)
    assert f"failed. `metaloom cluster resume {submitted}`" in metaloom("submit")
    assert "would run again" in metaloom("resume", submitted, "--dry-run=server")
    assert "runs again" in metaloom("resume", submitted)
    new = cluster.wait_for_state(submitted, "waiting", "running")
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    environment = new["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "METALOOM_COMMIT", "value": repository} in environment
    assert "has not ended" in metaloom("resume", submitted)
    running(cluster, cluster.pod(submitted), exit_code=0)
    cluster.wait_for_state(submitted, "succeeded")
    assert "nothing to resume" in metaloom("resume", submitted, status=1)


def test_a_run_that_is_being_cancelled_is_not_resumed_beside_its_old_driver(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    """Its pod is there until it has ended, as the real controller leaves it."""
    running(cluster, cluster.pod(submitted))
    job = cluster.wait_for_state(submitted, "running")
    notes = {"annotations": {CANCELLED_NOTE: "2026-11-30T02:31:00+00:00"}}
    cluster.kube.patch(JOBS, submitted, {"metadata": notes})
    told = metaloom("resume", submitted, status=1)
    assert "is still being cancelled: its driver has a minute" in told
    assert cluster.kube.get(JOBS, submitted)["metadata"]["uid"] == job["metadata"]["uid"]


def test_a_cancelled_run_ends_stays_and_can_be_resumed(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    running(cluster, cluster.pod(submitted))
    assert "would be cancelled" in metaloom("cancel", submitted, "--dry-run=server")
    assert "is being cancelled" in metaloom("cancel", submitted)
    job = cluster.wait_for_state(submitted, "cancelled")
    assert job["status"].get("active", 0) == 0
    assert "cancelled" in metaloom("status")
    assert "had ended before: cancelled" in metaloom("cancel", submitted)
    assert "runs again" in metaloom("resume", submitted)
    job = cluster.wait_for_state(submitted, "waiting")
    assert job["spec"]["activeDeadlineSeconds"] == 28800


def test_a_run_of_somebody_else_is_left_alone(cluster: Cluster, metaloom: Command) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}]}
    other = {"metadata": {"name": "backup"}, "spec": {"suspend": True, "template": {"spec": pod}}}
    cluster.kube.create(JOBS, typed(JOBS, other))
    assert "no retraining of Metaloom" in metaloom("cancel", "backup", status=1)
    assert "backup" not in metaloom("status")
    assert "there is no run 'none'" in metaloom("cancel", "none", status=1)


def test_status_shows_what_the_lease_tells(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    running(cluster, cluster.pod(submitted))
    cluster.wait_for_state(submitted, "running")
    with single_flight(cluster.kube, submitted, renew_seconds=0.3) as held:
        held.note(
            {
                "run": submitted,
                "stage": "meta_train",
                "step": 1200,
                "num_steps": 4000,
                "tasks_per_second": 21.53,
            }
        )
        eventually(lambda: "meta_train" in metaloom("status"))
        table = metaloom("status")
        told = json.loads(metaloom("status", "--json"))
    line = next(line for line in table.splitlines() if line.startswith(submitted))
    assert "running" in line and "1200/4000" in line and "21.53" in line and "2m" in line
    assert all(len(line) <= 80 for line in table.splitlines())
    assert told["runs"][0]["tasks_per_second"] == 21.53
    assert "not scheduled" in table


def test_a_table_fits_whatever_is_in_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        runs = [
            Run(
                run="r" * rng.randrange(1, 60),
                state=rng.choice(["waiting", "succeeded", "cancelling"]),
                age_seconds=10 ** rng.uniform(0, 8),
                stage=rng.choice([None, "pretrain", "sample_tasks"]),
                step=rng.choice([None, rng.randrange(10**6)]),
                num_steps=rng.choice([None, 10**6]),
                tasks_per_second=rng.choice([None, 10 ** rng.uniform(-3, 5)]),
                eta_seconds=rng.choice([None, 10 ** rng.uniform(0, 6)]),
                trouble=rng.choice([None, "word " * rng.randrange(60)]),
            )
            for _ in range(3)
        ]
        assert max(map(len, as_table(runs).splitlines())) <= 80
    assert [span(s) for s in (3, 89, 90, 3600, 7200, 200000)] == [
        "3s",
        "1m",
        "2m",
        "60m",
        "2h",
        "2d",
    ]


TROUBLES = {
    "gpus": (
        {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: none",
                }
            ]
        },
        r"waits for a free GPU: 0/3 nodes are available",
    ),
    "image": (
        {
            "containerStatuses": [
                {
                    "name": "driver",
                    "image": "registry/metaloom-train:1",
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {
                        "waiting": {
                            "reason": "ImagePullBackOff",
                            "message": "Back-off pulling image",
                        }
                    },
                }
            ]
        },
        r"image registry/metaloom-train:1 cannot be pulled.*imagePullSecrets",
    ),
    "placeholder": (
        {
            "containerStatuses": [
                {
                    "name": "driver",
                    "image": "m@sha256:" + "0" * 64,
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}},
                }
            ]
        },
        r"placeholder of the manifests.*under images:",
    ),
    "secret": (
        {
            "containerStatuses": [
                {
                    "name": "driver",
                    "image": "m",
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {
                        "waiting": {
                            "reason": "CreateContainerConfigError",
                            "message": 'secret "metaloom-s3" not found',
                        }
                    },
                }
            ]
        },
        r'secret "metaloom-s3" not found. Make what is missing',
    ),
    "memory": (
        {
            "containerStatuses": [
                {
                    "name": "driver",
                    "image": "m",
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                }
            ]
        },
        r"killed for want of memory",
    ),
    "volume": (
        {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "pod has unbound immediate PersistentVolumeClaims",
                }
            ]
        },
        r"its volume is not there",
    ),
}


@pytest.mark.parametrize("trouble", sorted(TROUBLES))
def test_status_says_what_keeps_a_run_from_running(
    trouble: str, cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    import re

    status, expected = TROUBLES[trouble]
    _ = cluster.ours  # a real scheduler has its own words for our pod, again and again
    cluster.set_status(cluster.pod(submitted), **status)
    told = json.loads(metaloom("status", "--json"))["runs"][0]
    assert re.search(expected, told["trouble"]), told
    assert all(len(line) <= 80 for line in metaloom("status").splitlines())


def test_a_volume_that_cannot_be_mounted_is_known_by_its_event(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    pod = cluster.pod(submitted)
    words = 'MountVolume.SetUp failed for volume "s3" : secret "metaloom-s3" not found'
    cluster.kube.create(EVENTS, typed(EVENTS, event_about(pod, "Pod", "FailedMount", words)))
    _ = cluster.ours
    told = json.loads(metaloom("status", "--json"))["runs"][0]
    assert 'secret "metaloom-s3" not found' in told["trouble"]


def test_a_used_up_quota_is_said(cluster: Cluster, repository: str, metaloom: Command) -> None:
    cluster.apply_retraining()
    server = cluster.ours
    asked = "requested: pods=1, used: pods=4, limited: pods=4"
    server.create_pod_fault = over_quota(server.resource("pods"), "x", "compute", asked)
    metaloom("submit")
    eventually(lambda: "quota is used up" in metaloom("status"))
    assert "compute, requested: pods=1" in " ".join(metaloom("status").split())


# Logs


def test_following_a_log_through_cuts_loses_and_repeats_nothing(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    server, pod = cluster.ours, cluster.pod(submitted)
    running(cluster, pod)
    server.log_cut_lines = 7
    expected = [f"line {number} " + "x" * (number % 50) for number in range(120)]

    def write() -> None:
        for number, line in enumerate(expected):
            server.logs.write(cluster.namespace, pod["metadata"]["name"], line)
            if number % 10 == 0:
                time.sleep(0.3)
        server.log_cut_lines = None
        running(cluster, pod, exit_code=0)

    writer = threading.Thread(target=write)
    writer.start()
    told = metaloom("logs", "--follow").splitlines()
    writer.join()
    assert told == expected


def test_lines_that_are_alike_are_all_told(cluster: Cluster, submitted: str) -> None:
    """Each with the same stamp, before and behind a cut."""
    server, pod = cluster.ours, cluster.pod(submitted)
    running(cluster, pod)
    name = pod["metadata"]["name"]
    stamp = "2026-11-29T02:30:00.000000001Z"
    for _ in range(9):
        server.logs.append(cluster.namespace, name, stamp, "the same")
    server.log_cut_lines = 4
    lines = read_logs(cluster.kube, cluster.kube.get(JOBS, submitted), follow=True)
    told = [next(lines) for _ in range(4)]
    server.log_cut_lines = None
    running(cluster, pod, exit_code=0)
    assert [*told, *lines] == ["the same"] * 9


def test_logs_go_on_with_the_next_pod(cluster: Cluster, metaloom: Command, submitted: str) -> None:
    server = cluster.ours

    def fare() -> None:
        for number, code in ((1, 1), (2, 0)):
            pod = cluster.pod(submitted, number)
            running(cluster, pod)
            server.logs.write(cluster.namespace, pod["metadata"]["name"], f"pod {number}")
            running(cluster, pod, exit_code=code)

    kubelet = threading.Thread(target=fare)
    kubelet.start()
    assert metaloom("logs", submitted, "--follow").splitlines() == ["pod 1", "pod 2"]
    kubelet.join()
    assert metaloom("logs").splitlines() == ["pod 1", "pod 2"]


def test_a_log_of_what_has_not_begun_says_why(
    cluster: Cluster, metaloom: Command, submitted: str
) -> None:
    cluster.pod(submitted)
    assert "has printed nothing (waiting)" in metaloom("logs", status=1)


# The schedule


def test_a_schedule_is_shown_asked_for_and_made(
    cluster: Cluster, metaloom: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.apply_retraining()
    wanted = ("schedule", "15 3 * * 1-5", "--time-zone", "Europe/Berlin")
    shown = metaloom(*wanted, "--dry-run=server")
    assert "-  schedule: 30 2 * * *" in shown and "+  schedule: 15 3 * * 1-5" in shown
    assert "+  suspend: false" in shown and shown.count("  runs ") == 3 and "03:15 CE" in shown
    assert cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]["suspend"] is True
    assert "nobody is there to agree" in metaloom(*wanted, status=1)
    assert cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]["suspend"] is True
    metaloom(*wanted, "--yes")
    spec = cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("15 3 * * 1-5", "Europe/Berlin")
    assert spec["suspend"] is False and spec["concurrencyPolicy"] == "Forbid"
    assert "scheduled: 15 3 * * 1-5 (Europe/Berlin)" in metaloom("status")
    assert "like that already" in metaloom(*wanted, "--yes")
    assert json.loads(metaloom("unschedule", "--yes", "--json"))["changed"]
    assert cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("0 25 * * *",), "'25' cannot be a hour"),
        (("nightly",), "no cron schedule: it has 1 fields"),
        (("TZ=UTC 0 2 * * *",), "--time-zone"),
        (("0 2 * * *", "--time-zone", "berlin"), "Did you mean Europe/Berlin"),
    ],
)
def test_a_schedule_is_checked_before_the_cluster_is_asked(
    arguments: tuple[str, ...], expected: str, metaloom: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert expected in metaloom("schedule", *arguments, status=1)


def test_a_preview_that_is_out_of_date_is_not_applied(cluster: Cluster) -> None:
    from pipeline.cluster.kube.scheduling import apply, preview_schedule

    cluster.apply_retraining()
    preview = preview_schedule(cluster.kube, "0 4 * * *", "UTC")
    cluster.kube.patch(CRON_JOBS, RETRAIN, {"spec": {"failedJobsHistoryLimit": 7}})
    with pytest.raises(PipelineError, match="was changed while you looked"):
        apply(cluster.kube, preview)
    assert cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]["schedule"] == "30 2 * * *"


# The doctor


def healthy(cluster: Cluster) -> None:
    """All that the two manifests name, with an image that exists."""
    cluster.apply_retraining()
    cluster.kube.create(RAY_JOBS, manifest("train.yaml", "RayJob"))
    for name in ("metaloom-git", "metaloom-s3", "metaloom-mlflow", "metaloom-ray-token"):
        cluster.kube.create(SECRETS, typed(SECRETS, {"metadata": {"name": name}}))
    settings = manifest("settings.yaml", "ConfigMap")
    settings["data"]["METALOOM_REPOSITORY"] = "https://git.internal/examples/models.git"
    cluster.kube.create(CONFIG_MAPS, settings)
    for name in ("metaloom-git-config", "metaloom-serve"):
        cluster.kube.create(CONFIG_MAPS, typed(CONFIG_MAPS, {"metadata": {"name": name}}))
    for name in ("metaloom-train", "metaloom-train-head"):
        cluster.kube.create(SERVICE_ACCOUNTS, typed(SERVICE_ACCOUNTS, {"metadata": {"name": name}}))


def test_the_doctor_finds_a_healthy_cluster_healthy(cluster: Cluster, metaloom: Command) -> None:
    cluster.needs_ray_jobs()
    healthy(cluster)
    told = metaloom("doctor")
    assert "PROBLEM" not in told
    for name in ("Kubernetes", "permissions", "KubeRay", "secret", "GPUs", "queue", "storage"):
        assert f"ok      {name}" in told, told


BREAKS: dict[str, tuple[Callable[[Cluster], Any], str, str]] = {
    "namespace": (
        lambda c: c.ours.store.delete(c.ours.resource("namespaces"), "", c.namespace),
        "namespace",
        "kubectl apply",
    ),
    "role": (lambda c: c.ours.denied.append(("create", "jobs")), "permissions", "Role"),
    "log role": (lambda c: c.ours.denied.append(("get", "pods/log")), "permissions", "Role"),
    "cron job": (lambda c: c.kube.delete(CRON_JOBS, RETRAIN), "CronJob", "kubectl apply"),
    "ray job": (lambda c: c.kube.delete(RAY_JOBS, "metaloom-train"), "RayJob", "kubectl apply"),
    "secret": (lambda c: c.kube.delete(SECRETS, "metaloom-s3"), "secret", "create secret"),
    "token": (lambda c: c.kube.delete(SECRETS, "metaloom-ray-token"), "secret", "create secret"),
    "settings": (lambda c: c.kube.delete(CONFIG_MAPS, "metaloom-settings"), "settings", "apply"),
    "account": (
        lambda c: c.kube.delete(SERVICE_ACCOUNTS, "metaloom-train-head"),
        "account",
        "apply",
    ),
    "crd": (
        lambda c: setattr(
            c.ours, "resources", [r for r in c.ours.resources if r.group != "ray.io"]
        ),
        "KubeRay",
        "operator",
    ),
    "storage": (
        lambda c: c.kube.patch(
            CONFIG_MAPS, "metaloom-settings", {"data": {"METALOOM_STORAGE": "bucket"}}
        ),
        "storage",
        "s3://",
    ),
    "old server": (lambda c: setattr(c.ours, "minor", "31"), "Kubernetes", "1.32 or later"),
    "repository": (
        lambda c: c.kube.patch(
            CONFIG_MAPS,
            "metaloom-settings",
            {"data": manifest("settings.yaml", "ConfigMap")["data"]},
        ),
        "repository",
        "set it in metaloom-settings",
    ),
    "queue": (
        lambda c: c.kube.patch(
            RAY_JOBS, "metaloom-train", {"metadata": {"annotations": {"metaloom.dev/queue": "q"}}}
        ),
        "queue",
        "overlays/kueue",
    ),
}


@pytest.mark.parametrize("broken", sorted(BREAKS))
def test_the_doctor_finds_what_is_missing(broken: str, cluster: Cluster, metaloom: Command) -> None:
    _ = cluster.ours
    healthy(cluster)
    break_it, name, mend = BREAKS[broken]
    break_it(cluster)
    told = metaloom("doctor", status=1)
    problems = [line for line in told.splitlines() if line.startswith("PROBLEM")]
    assert any(line.startswith(f"PROBLEM {name}") for line in problems), told
    assert mend in told.partition(f"PROBLEM {name}")[2].splitlines()[1]


def test_the_doctor_asks_for_no_ray_where_the_driver_trains_itself(
    cluster: Cluster, metaloom: Command
) -> None:
    server = cluster.ours
    healthy(cluster)
    cluster.kube.delete(RAY_JOBS, "metaloom-train")
    server.resources = [r for r in server.resources if r.group != "ray.io"]
    found = cluster.kube.get(CRON_JOBS, RETRAIN)
    driver = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    for entry in driver["env"]:
        if entry["name"] == "METALOOM_LAUNCHER":
            entry["value"] = "local"
    cluster.kube.replace(CRON_JOBS, found)
    assert "PROBLEM" not in metaloom("doctor")


def test_the_doctor_knows_the_placeholder_image(cluster: Cluster, metaloom: Command) -> None:
    healthy(cluster)
    found = cluster.kube.get(CRON_JOBS, RETRAIN)
    driver = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    driver["image"] = "metaloom-train@sha256:" + "0" * 64
    cluster.kube.replace(CRON_JOBS, found)
    assert "PROBLEM CronJob" in metaloom("doctor", status=1)


def test_the_doctor_counts_gpus(cluster: Cluster) -> None:
    _ = cluster.ours
    healthy(cluster)
    kube = cluster.kube
    groups = kube.get(RAY_JOBS, "metaloom-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups[0]["minReplicas"] = 2
    groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "2"
    kube.patch(
        RAY_JOBS, "metaloom-train", {"spec": {"rayClusterSpec": {"workerGroupSpecs": groups}}}
    )
    found = {f.name: f for f in examine(kube)}["GPUs"]
    assert not found.ok and found.found == "0 on 0 nodes, 4 needed at least"


# One sentence, no traceback


def test_what_goes_wrong_is_one_sentence(
    cluster: Cluster, repository: str, metaloom: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cluster.ours
    assert "there is no CronJob metaloom-retrain" in metaloom("submit", status=1)
    assert "there is no CronJob metaloom-retrain" in metaloom("unschedule", "--yes", status=1)
    cluster.apply_retraining()
    server.denied.append(("create", "jobs"))
    assert "not allowed to create jobs.batch" in metaloom("submit", status=1)
    server.denied.clear()
    asked = "requested: count/jobs.batch=1, used: 5, limited: 5"
    server.refuse("create", "jobs", over_quota(server.resource("jobs"), "x", "jobs", asked), 1)
    assert "quota" in metaloom("submit", status=1)
    server.refuse(".*", ".*", unauthorized(), 1)
    assert "Log in again" in metaloom("status", status=1)
    assert "there is no run 'x'" in metaloom("logs", "x", status=1)
    assert "names no commit" in metaloom("submit", "nothing", status=1)
    elsewhere = metaloom("submit", "--namespace", "not-there", status=1)
    assert "CronJob" in elsewhere and "not-there" in elsewhere
    monkeypatch.setattr("pipeline.cluster.kube.connect._ONE_COMMAND_SECONDS", 0.2)
    server.stop()
    for command in (["doctor"], ["submit"], ["status"], ["logs"], ["cancel", "x"], ["resume", "x"]):
        assert "does not answer" in metaloom(*command, status=1)
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    for command in (["doctor"], ["unschedule"]):
        assert "there is no kubeconfig" in metaloom(*command, status=1)


def test_a_lease_of_the_manifests_is_nobody_s(cluster: Cluster, metaloom: Command) -> None:
    cluster.kube.create(LEASES, manifest("accounts.yaml", "Lease"))
    assert "no runs yet" in metaloom("status")


def test_nothing_is_left_of_pods(cluster: Cluster, submitted: str) -> None:
    job = cluster.kube.get(JOBS, submitted)
    cluster.pod(submitted)
    cluster.kube.delete(JOBS, submitted, uid=job["metadata"]["uid"])
    eventually(lambda: not cluster.kube.select(PODS))
