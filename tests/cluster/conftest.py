"""Real servers of this machine. A test names those that it needs; they are started once.

With METALOOM_CLUSTER set to the folder of a cluster that runs (`make cluster-up`), its servers are
used and left running.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local import postgres as postgres_server
from infra.local import s3 as s3_server
from infra.local.servers import Server
from pipeline.core.errors import MachineError


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayCluster:
    """Two nodes; each is a `Server`, so `node.kill()` is the death of a whole machine."""

    head: Server
    node: Server

    @property
    def environment(self) -> dict[str, str]:
        return self.head.environment

    def start(self) -> None:
        self.head.start()
        self.node.start()

    def stop(self) -> None:
        self.node.stop()
        self.head.stop()


def needs(*modules: str) -> None:
    """Skip, by name, where a package of the extras `ray`, `s3`, `servers` or `onnx` is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (make test-cluster installs it)")


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """The folder of a running cluster, or a new one that is removed at the end.

    Not one of pytest's: those bar the way to the user that PostgreSQL runs as when root starts it.
    """
    if given := os.environ.get("METALOOM_CLUSTER"):
        yield Path(given).resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="metaloom-cluster-"))
    yield folder
    shutil.rmtree(folder)


def served(name: str, cluster: Path) -> Iterator[Server]:
    """Start a server, and stop it afterwards unless it ran before."""
    server = Server(name=name, cluster=cluster)
    ran = server.runs()
    server.start()
    yield server
    if not ran:
        server.stop()


@pytest.fixture(scope="session")
def postgres(cluster_folder: Path) -> Iterator[Server]:
    needs("psycopg2")
    try:
        postgres_server.find_binaries()
    except MachineError as error:
        pytest.skip(str(error))
    yield from served("postgres", cluster_folder)


@pytest.fixture(scope="session")
def s3(cluster_folder: Path) -> Iterator[Server]:
    try:
        s3_server.find_weed()
    except MachineError as error:
        pytest.skip(str(error))
    yield from served("s3", cluster_folder)


@pytest.fixture(scope="session")
def mlflow_server(cluster_folder: Path, postgres: Server, s3: Server) -> Iterator[Server]:
    needs("mlflow", "flask_wtf", "boto3")
    yield from served("mlflow", cluster_folder)


@pytest.fixture(scope="session")
def ray_cluster(cluster_folder: Path) -> Iterator[RayCluster]:
    needs("ray")
    for head in served("ray_head", cluster_folder):
        for node in served("ray_node", cluster_folder):
            yield RayCluster(head=head, node=node)
