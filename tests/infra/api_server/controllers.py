"""What a cluster's own controllers do for the kinds of these tests: Jobs make pods."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

from tests.infra.api_server.server import ApiServer
from tests.infra.api_server.status import RefusedError
from tests.infra.api_server.store import Object, now


class JobController:
    """Every Job gets a pod; the pod's phase ends the Job; suspending and deadlines end the pod.

    As the real one, as far as the client can see it. Nobody runs the pods: a test that says how
    one fares writes its status, as a kubelet would.
    """

    def __init__(self, server: ApiServer) -> None:
        self._server, self._store = server, server.store
        self._jobs, self._pods = server.resource("jobs"), server.resource("pods")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="jobs")

    def __enter__(self) -> JobController:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(0.03):
            for job in self._store.select(self._jobs, "")[0]:
                try:
                    self._sync(job)
                except RefusedError as refused:
                    if refused.code == 403:
                        self._tell(job, refused.message)

    def _sync(self, job: Object) -> None:
        if is_finished(job):
            return
        namespace = job["metadata"]["namespace"]
        labels = f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"
        pods = self._store.select(self._pods, namespace, labels)[0]
        phases = [pod["status"].get("phase") for pod in pods]
        failed = phases.count("Failed")
        active = [p for p in pods if p["status"].get("phase") in ("Pending", "Running")]
        status = {"startTime": now(), **job.get("status", {})}
        deadline = job["spec"].get("activeDeadlineSeconds")
        if "Succeeded" in phases:
            self._end(
                job,
                status,
                "Complete",
                "CompletionsReached",
                "Reached expected number of succeeded pods",
            )
        elif failed > job["spec"]["backoffLimit"]:
            self._end(
                job,
                status,
                "Failed",
                "BackoffLimitExceeded",
                "Job has reached the specified backoff limit",
            )
        elif job["spec"].get("suspend"):
            self._remove(active)
            self._write(job, {**{k: v for k, v in status.items() if k != "startTime"}, "active": 0})
        elif deadline is not None and _age(status["startTime"]) >= deadline:
            self._remove(active)
            self._end(
                job,
                status,
                "Failed",
                "DeadlineExceeded",
                "Job was active longer than specified deadline",
            )
        else:
            if not active and self._server.create_pod_fault is not None:
                raise self._server.create_pod_fault
            # The real one waits for ten seconds before the second pod, and longer for the next.
            if not active and now() not in {pod["metadata"]["creationTimestamp"] for pod in pods}:
                self._server.store.create(
                    self._pods, namespace, _pod_of(job), dry_run=False, strict=False
                )
            ready = sum(p["status"].get("phase") == "Running" for p in active)
            self._write(job, {**status, "active": 1, "ready": ready, "failed": failed})

    def _remove(self, pods: list[Object]) -> None:
        for pod in pods:
            self._store.delete(self._pods, pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _end(self, job: Object, status: Object, kind: str, reason: str, message: str) -> None:
        condition = {
            "type": kind,
            "status": "True",
            "reason": reason,
            "message": message,
            "lastTransitionTime": now(),
        }
        ended: dict[str, Any] = {**status, "active": 0, "conditions": [condition]}
        if kind == "Complete":
            ended |= {"succeeded": 1, "completionTime": now()}
        self._write(job, ended)

    def _write(self, job: Object, status: Object) -> None:
        self._store.update(
            self._jobs,
            job["metadata"]["namespace"],
            job["metadata"]["name"],
            lambda old: {**old, "metadata": {}, "status": status},
            subresource="status",
            dry_run=False,
            strict=False,
        )

    def _tell(self, job: Object, message: str) -> None:
        namespace = job["metadata"]["namespace"]
        fields = f"involvedObject.name={job['metadata']['name']},reason=FailedCreate"
        events = self._server.resource("events")
        if self._store.select(events, namespace, fields=fields)[0]:
            return
        event = event_about(job, "Job", "FailedCreate", f"Error creating: {message}")
        self._store.create(events, namespace, event, dry_run=False, strict=False)


def event_about(item: Object, kind: str, reason: str, message: str) -> Object:
    """A warning, as controllers and kubelets leave them."""
    metadata = item["metadata"]
    return {
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "kind": kind,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": message,
        "type": "Warning",
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    }


def is_finished(job: Object) -> bool:
    return any(
        c["type"] in ("Complete", "Failed") and c["status"] == "True"
        for c in job.get("status", {}).get("conditions", [])
    )


def _pod_of(job: Object) -> Object:
    template = copy.deepcopy(job["spec"]["template"])
    metadata = job["metadata"]
    return {
        "metadata": {
            **template.get("metadata", {}),
            "generateName": f"{metadata['name']}-",
            "namespace": metadata["namespace"],
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                }
            ],
        },
        "spec": template["spec"],
    }


def _age(stamp: str) -> float:
    from datetime import datetime

    return time.time() - datetime.fromisoformat(stamp).timestamp()
