"""What a driver shows of its work, from what DVC and the stages print."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import pytest

from pipeline.cluster.kube.driving import Listener, driving, run_of
from pipeline.cluster.kube.exported import exported
from pipeline.cluster.kube.kinds import LEASES, RETRAIN
from pipeline.cluster.kube.lease import Held, holder_of
from pipeline.core.errors import MachineError
from pipeline.deploy.smoke import free_port
from tests.cluster.test_retrain import Small
from tests.infra.api_server.server import ApiServer
from tests.infra.kube_cluster import Cluster, api_server, cluster, eventually

__all__ = ["api_server", "cluster"]


def test_stage_step_and_rate_come_from_what_is_printed() -> None:
    held = Held()
    exported: list[Mapping[str, object]] = []
    listen = Listener("retrain-1a2b3c4d5e-00000000", held, exported.append)
    listen("Running stage 'meta_train':")
    assert json.loads(held.progress())["stage"] == "meta_train"
    line = {"event": "meta_train", "done": 8, "total": 64, "tasks_per_second": 2.5, "loss": 1.0}
    line["eta_seconds"] = 22.4
    for noise in (json.dumps(line), '{"event": torn', '{"event": "x", "done": "?"}', "x" * 9999):
        listen(noise)
    told = json.loads(held.progress())
    assert exported == [
        {"run": told["run"], "stage": "meta_train"},
        {key: value for key, value in told.items() if key != "updated"},
    ]
    assert told.pop("updated")
    assert told == {
        "run": "retrain-1a2b3c4d5e-00000000",
        "stage": "meta_train",
        "step": 8,
        "num_steps": 64,
        "tasks_per_second": 2.5,
        "eta_seconds": 22.4,
    }


def test_prometheus_reads_the_stage_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("METALOOM_METRICS_PORT", str(port))

    def scraped() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    first = {"run": "night", "stage": "meta_train", "step": 8, "num_steps": 64}
    with exported() as note:
        note({**first, "tasks_per_second": 2.5, "eta_seconds": 22.4})
        told = scraped()
        assert 'metaloom_run_tasks_per_second{run="night",stage="meta_train"} 2.5' in told
        assert 'metaloom_run_step{run="night",stage="meta_train"} 8.0' in told
        note({"run": "night", "stage": "evaluate"})
        assert "meta_train" not in scraped()
    with pytest.raises(URLError):
        scraped()  # a run that has ended


@pytest.mark.parametrize("port", ["none", "70000", "-1"])
def test_a_port_that_is_none_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALOOM_METRICS_PORT", port)
    with pytest.raises(MachineError, match=f"METALOOM_METRICS_PORT is '{port}'"), exported():
        pass


def test_a_pod_has_its_jobs_name_and_a_laptop_holds_no_lease() -> None:
    assert run_of("retrain-1a2b3c4d5e-00000000-x7k2p") == "retrain-1a2b3c4d5e-00000000"
    assert run_of("laptop") == "laptop"
    with driving() as listen:
        assert listen is None


POD = """
import os, shutil, socket, subprocess, sys
name, mounted, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/var/run"], check=True)
shutil.copytree(mounted, "/var/run/secrets/kubernetes.io/serviceaccount")
socket.sethostname(name)
os.execv(command[0], command)
"""


def in_a_pod(
    name: str, folder: Path, env: dict[str, str], server: ApiServer, mounted: Path
) -> subprocess.Popen[str]:
    """`metaloom retrain` with a pod's name and its service account, mounted where a kubelet does."""
    address = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}
    env = {key: value for key, value in env.items() if key != "KUBECONFIG"} | address
    command = ["unshare", "--mount", "--uts", sys.executable, "-c", POD, name, str(mounted)]
    return subprocess.Popen(
        [*command, sys.executable, "-m", "pipeline.cli", "retrain", "--local"],
        cwd=folder,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def may_mount() -> bool:
    """Whether this user may have mounts and a host name of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "--uts", "mount", "-t", "tmpfs", "tmpfs", "/var/run"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(600)
@pytest.mark.skipif(not may_mount(), reason="may not mount here")
def test_of_two_drivers_in_pods_one_is_refused_and_the_other_stops_without_its_lease(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.ours
    server.service_account(mounted := tmp_path / "mounted", cluster.namespace)
    small = Small(tmp_path / "one")
    small.write("pipeline/wish.json", '"wait"')
    small.commit("slow")
    shutil.copytree(small.folder, tmp_path / "two", symlinks=True)  # on another machine
    driver = in_a_pod("retrain-one-x7k2p", tmp_path / "one", small.env, server, mounted)
    try:
        eventually(lambda: driver.poll() is not None or small.num_runs(), 180)
        assert holder_of(cluster.kube.get(LEASES, RETRAIN)) == "retrain-one"
        late = in_a_pod("retrain-two-b4n8q", tmp_path / "two", small.env, server, mounted)
        _, said = late.communicate(timeout=180)
        assert late.returncode == 1 and "is held by retrain-one" in said, said
        assert "Traceback" not in said and small.num_runs() == 1
        spec = {"spec": {"holderIdentity": "retrain-three"}}
        cluster.kube.patch(LEASES, RETRAIN, spec)
        _, said = driver.communicate(timeout=180)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode not in (0, -signal.SIGKILL) and "Traceback" not in said, said
    assert "the Lease is lost" in said or "stopped by SIGTERM" in said, said
    assert small.log.with_name("checkpoint").read_text() == "saved" and not small.branches()
    assert holder_of(cluster.kube.get(LEASES, RETRAIN)) == "retrain-three"
