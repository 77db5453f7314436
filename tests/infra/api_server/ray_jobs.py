"""What KubeRay does with a RayJob, as far as its owner sees it: the entrypoint really runs.

As a process of this machine, with a workspace of its own, which its init container fills.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.infra.api_server.server import ApiServer
from tests.infra.api_server.status import RefusedError
from tests.infra.api_server.store import Object

_PASSED_ON = ("PATH", "LANG", "AWS_", "VIRTUAL_ENV")


class RayJobController:
    """Runs RayJobs one beside the other; deletes what belongs to deleted ones."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self._server, self._store, self._folder = server, server.store, folder
        self._kind, self._pods = server.resource("rayjobs"), server.resource("pods")
        self._ending = threading.Event()
        self._runs: dict[str, threading.Thread] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rayjobs")
        self.has_gpus = True
        """Without them, pods stay pending"""
        self.processes: list[subprocess.Popen[bytes]] = []
        """Each attempt's entrypoint, in order"""

    def __enter__(self) -> RayJobController:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()
        for run in self._runs.values():
            run.join()

    def workspace(self, attempt: int) -> Path:
        return self._folder / f"pod-{attempt}"

    def log(self) -> str:
        logs = sorted(self._folder.glob("pod-*.log"))
        return "\n".join(path.read_text() for path in logs)

    def _watch(self) -> None:
        while not self._ending.wait(0.05):
            for item in self._store.select(self._kind, "")[0]:
                uid = item["metadata"]["uid"]
                if uid not in self._runs and not item["spec"].get("suspend"):
                    thread = threading.Thread(target=self._run, args=(item,), daemon=True)
                    self._runs[uid] = thread
                    thread.start()

    def _is_there(self, item: Object) -> bool:
        metadata = item["metadata"]
        try:
            found = self._store.get(self._kind, metadata["namespace"], metadata["name"])
        except RefusedError:
            return False
        same: bool = found["metadata"]["uid"] == metadata["uid"]
        return same and not self._ending.is_set()

    def _tell(self, item: Object, **status: object) -> None:
        metadata = item["metadata"]
        item["status"] = {**item.get("status", {}), **status}
        with suppress(RefusedError):
            self._store.update(
                self._kind,
                metadata["namespace"],
                metadata["name"],
                lambda old: {**old, "metadata": {}, "status": item["status"]},
                subresource="status",
                dry_run=False,
                strict=False,
            )

    def _run(self, item: Object) -> None:
        for attempt in range(item["spec"].get("backoffLimit", 0) + 1):
            name = f"{item['metadata']['name']}-{uuid.uuid4().hex[:5]}"
            self._tell(item, jobDeploymentStatus="Initializing", rayClusterName=name)
            pod = self._make_pod(item, name)
            while not self.has_gpus and self._is_there(item):
                self._set_pod(pod, _NO_GPUS)
                time.sleep(0.05)
            if not self._is_there(item):
                return
            self._set_pod(pod, {"phase": "Running"})
            self._tell(item, jobDeploymentStatus="Running", jobStatus="RUNNING")
            code = self._attempt(item)
            if not self._is_there(item):
                return
            if code == 0:
                self._tell(item, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
                return
            if attempt < item["spec"].get("backoffLimit", 0):
                self._tell(item, jobDeploymentStatus="Retrying", jobStatus="FAILED")
        self._tell(
            item,
            jobDeploymentStatus="Failed",
            jobStatus="FAILED",
            reason="AppFailed",
            message=f"Job entrypoint command failed with exit code {code}",
        )

    def _attempt(self, item: Object) -> int:
        """The init container, then the entrypoint; its status."""
        number = len(self.processes)
        workspace = self.workspace(number)
        workspace.mkdir(parents=True)
        group = item["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        first = group["initContainers"][0]
        command = [sys.executable, *first["command"][1:], str(workspace)]
        environment = self._environment(first, workspace)
        with (self._folder / f"pod-{number}.log").open("ab") as log:
            done = subprocess.run(
                command, env=environment, cwd=self._folder, stdout=log, stderr=log, check=False
            )
            if done.returncode:
                return done.returncode
            entrypoint = shlex.split(item["spec"]["entrypoint"])
            process = subprocess.Popen(
                [sys.executable, *entrypoint[1:]],
                env=self._environment(group["containers"][0], workspace),
                cwd=workspace,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        while process.poll() is None:
            if not self._is_there(item):
                _end(process)
            time.sleep(0.05)
        return process.returncode

    def _environment(self, container: Object, workspace: Path) -> dict[str, str]:
        told = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
        here = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
        mapped = {k: str(workspace) if v == "/workspace" else v for k, v in told.items()}
        home = self._folder / "home"
        home.mkdir(exist_ok=True)
        code = os.pathsep.join(filter(None, [mapped.get("PYTHONPATH"), str(REPOSITORY)]))
        return {
            **here,
            **mapped,
            "PYTHONPATH": code,
            "HOME": str(home),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def _make_pod(self, item: Object, cluster: str) -> Object:
        spec = item["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        metadata = item["metadata"]
        owner = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        pod = {
            "metadata": {
                "generateName": f"{cluster}-head-",
                "labels": {"ray.io/cluster": cluster},
                "ownerReferences": [owner],
            },
            "spec": spec,
        }
        return self._store.create(
            self._pods, metadata["namespace"], pod, dry_run=False, strict=False
        )

    def _set_pod(self, pod: Object, status: Object) -> None:
        with suppress(RefusedError):
            self._store.update(
                self._pods,
                pod["metadata"]["namespace"],
                pod["metadata"]["name"],
                lambda old: {**old, "metadata": {}, "status": status},
                subresource="status",
                dry_run=False,
                strict=False,
            )


_NO_GPUS = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        }
    ],
}


def _end(process: subprocess.Popen[bytes], grace_seconds: float = 20) -> None:
    """As a pod ends: asked first, then killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
