"""A namespace with the manifests' template of training jobs, and a controller that runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.connect import connect
from pipeline.cluster.kube.kinds import RAY_JOBS
from tests.infra.api_server.ray_jobs import RayJobController
from tests.infra.api_server.server import ApiServer
from tests.infra.kube_cluster import manifest, new_namespace

NAMESPACE = "metaloom"


@dataclass(frozen=True)
class TrainingCluster:
    """What a driver needs is in `environment`."""

    kube: Kube
    server: ApiServer
    controller: RayJobController
    environment: dict[str, str] = field(default_factory=dict)


def training_cluster(folder: Path) -> Iterator[TrainingCluster]:
    """Of our own API server; a real one would need pods that really run."""
    server = ApiServer()
    before = os.environ.get("KUBECONFIG")
    path = server.kubeconfig(folder / "kubeconfig", NAMESPACE)
    os.environ["KUBECONFIG"] = str(path)
    kube = connect()
    if before is None:
        del os.environ["KUBECONFIG"]
    else:
        os.environ["KUBECONFIG"] = before
    new_namespace(kube, NAMESPACE)
    kube.create(RAY_JOBS, manifest("train.yaml", "RayJob"))
    (folder / "store").mkdir()
    environment = {
        "KUBECONFIG": str(path),
        "METALOOM_STORAGE": (folder / "store").as_uri(),
        "METALOOM_NUM_WORKERS": "2",
    }
    with RayJobController(server, folder) as controller:
        yield TrainingCluster(kube, server, controller, environment)
    server.stop()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[TrainingCluster]:
    folder = tmp_path / "kubernetes"
    folder.mkdir()
    yield from training_cluster(folder)
