"""What the overlay `rayservice` asks of Ray Serve, told to a real one as KubeRay tells it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipeline.core.errors import ConfigError
from pipeline.deploy.serve.ray_service import application
from tests.cluster.conftest import RayCluster, needs
from tests.conftest import REPOSITORY
from tests.serve.service_process import ServiceProcess
from tests.serve.test_api import live
from tests.unit.tiny_learner import tiny_bundle

needs("grpc_reflection")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
_PATIENCE_SECONDS = 120.0


def told() -> Any:
    """serveConfigV2 of the overlay."""
    path = REPOSITORY / "infra" / "kubernetes" / "overlays" / "rayservice" / "service.yaml"
    documents = yaml.safe_load_all(path.read_text())
    service = next(one for one in documents if one["kind"] == "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.fixture
def dashboard(ray_cluster: RayCluster) -> Iterator[httpx.Client]:
    """Ray's own, with the token."""
    environment = ray_cluster.environment
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    with httpx.Client(
        base_url=environment["RAY_API_SERVER_ADDRESS"],
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
    ) as client:
        yield client
        client.delete("/api/serve/applications/").raise_for_status()


def test_the_application_of_the_overlay_keeps_the_contract(
    dashboard: httpx.Client, tmp_path: Path
) -> None:
    service = ServiceProcess(tmp_path, str(tiny_bundle(tmp_path).folder))  # of it, only the files
    config = told()
    config["http_options"] |= {"host": "127.0.0.1", "port": service.port}
    config["applications"][0]["args"] |= {
        "model": service.model,
        "config": str(service.config),
        "replicas": "1",
    }
    dashboard.put("/api/serve/applications/", json=config).raise_for_status()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (state := _state(dashboard))["status"] != "RUNNING":
        assert state["status"] != "DEPLOY_FAILED" and time.monotonic() < deadline, state
        time.sleep(0.5)
    with service.client() as client:
        live(client)


def _state(dashboard: httpx.Client) -> dict[str, Any]:
    found = dashboard.get("/api/serve/applications/").raise_for_status().json()["applications"]
    return {"status": "NOT_STARTED", **found.get("metaloom", {})}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "m"}, "args is not usable"),
        ({"model": "m", "config": "gone.yaml", "replica": "1"}, "replica"),
        ({"model": "m", "config": "gone.yaml"}, "gone.yaml"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        application(arguments)
