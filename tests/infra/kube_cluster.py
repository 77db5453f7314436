"""The cluster that tests of the client use: the API server of this folder, or a real one.

With KUBECONFIG set, a namespace is made on that cluster and removed afterwards. Its own controllers
make pods of Jobs; no pod is ever run: a test writes the status that a kubelet would.
"""

from __future__ import annotations

import copy
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.connect import connect
from pipeline.cluster.kube.errors import ExistsError, MissingError
from pipeline.cluster.kube.kinds import (
    CRON_JOBS,
    JOBS,
    NAMESPACES,
    PODS,
    RAY_JOBS,
    RETRAIN,
    SERVICE_ACCOUNTS,
)
from pipeline.cluster.kube.runs import pods_of
from tests.conftest import REPOSITORY
from tests.infra.api_server.controllers import JobController
from tests.infra.api_server.server import ApiServer

MANIFESTS = REPOSITORY / "infra" / "kubernetes" / "base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Cluster:
    """A namespace for one test."""

    kube: Kube
    server: ApiServer | None
    """Ours; None for a real cluster"""

    @property
    def namespace(self) -> str:
        return self.kube.namespace

    @property
    def ours(self) -> ApiServer:
        """Our own server, for faults that a real one does not have on demand."""
        if self.server is None:
            pytest.skip("a real cluster does not fail on demand")
        return self.server

    def needs_ray_jobs(self) -> None:
        if not self.kube.ask(f"/apis/{RAY_JOBS.api_version}"):
            pytest.skip("this cluster has no RayJobs (install KubeRay's CRDs)")

    def apply_retraining(self) -> dict[str, Any]:
        """The manifests' CronJob and its account; its pods fit on no node, and are tried again once."""
        made = copy.deepcopy(manifest("retrain.yaml", "CronJob"))
        pod = made["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        pod["nodeSelector"] = {"metaloom.dev/no-such-node": "true"}
        made["spec"]["jobTemplate"]["spec"]["backoffLimit"] = 1
        account = {"metadata": {"name": pod["serviceAccountName"]}}
        with suppress(ExistsError):
            self.kube.create(SERVICE_ACCOUNTS, typed(SERVICE_ACCOUNTS, account))
        return self.kube.create(CRON_JOBS, made)

    def pod(self, run: str, number: int = 1) -> dict[str, Any]:
        """The run's newest pod, once it has so many."""

        def look() -> dict[str, Any] | None:
            pods = pods_of(self.kube, self.kube.get(JOBS, run))
            return pods[-1] if len(pods) >= number else None

        found: dict[str, Any] = eventually(look)
        return found

    def set_status(self, pod: dict[str, Any], **status: Any) -> None:
        """As its kubelet, or the scheduler, would."""
        name = pod["metadata"]["name"]
        self.kube.patch(PODS, name, {"status": status}, subresource="status")

    def wait_for_state(self, run: str, *states: str) -> dict[str, Any]:
        from pipeline.cluster.kube.retraining import state_of

        def look() -> dict[str, Any] | None:
            try:
                job = self.kube.get(JOBS, run)
            except MissingError:
                return None
            return job if state_of(job) in states else None

        found: dict[str, Any] = eventually(look)
        return found


def eventually(look: Callable[[], Any], seconds: float = 30) -> Any:
    """What `look` finds, as soon as it finds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing came of it within {seconds} s")


def typed(kind: Any, item: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": kind.api_version, "kind": kind.kind, **item}


def manifest(file: str, kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((MANIFESTS / file).read_text())
    found: dict[str, Any] = next(d for d in documents if d["kind"] == kind)
    return with_images(found)


def with_images(item: Any) -> Any:
    """With images that could be pulled, instead of the manifests' placeholders."""
    if isinstance(item, list):
        return [with_images(value) for value in item]
    if not isinstance(item, dict):
        return item
    made = {key: with_images(value) for key, value in item.items()}
    return {**made, "image": "metaloom-train:tests"} if "image" in item else made


def new_namespace(kube: Kube, name: str) -> None:
    kube.create(NAMESPACES, typed(NAMESPACES, {"metadata": {"name": name}}))


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    """Our server, with the controller of Jobs."""
    server = ApiServer()
    with JobController(server):
        yield server
    server.stop()


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    name = f"metaloom-test-{uuid.uuid4().hex[:8]}"
    if os.environ.get("KUBECONFIG"):
        kube = connect(name, patience_seconds=30)
        new_namespace(kube, name)
        try:
            yield Cluster(kube, None)
        finally:
            kube.delete(NAMESPACES, name)
        return
    server: ApiServer = request.getfixturevalue("api_server")
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig", name)))
    kube = connect(name)
    new_namespace(kube, name)
    yield Cluster(kube, server)


__all__ = ["COMMIT", "RETRAIN", "Cluster", "api_server", "cluster"]
