"""The service as a Ray Serve deployment: the same contract, and a killed replica costs no answer."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import RayCluster, needs
from tests.serve.asking import http, queries, support
from tests.serve.service_process import ServiceProcess, wait_until
from tests.serve.test_api import live
from tests.unit.tiny_learner import tiny_bundle

needs("grpc_reflection")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    one = ServiceProcess(tmp_path, str(tiny_bundle(tmp_path).folder))
    yield one
    assert one.process is not None
    if one.process.poll() is None:
        one.stop()


def replicas() -> list[int]:
    """Process ids of the living ones."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if re.match(r"ray::ServeReplica:metaloom", " ".join(process.info["cmdline"] or []))
    ]


def test_one_replica_keeps_the_contract_and_goes_with_its_command(
    ray_cluster: RayCluster, service: ServiceProcess
) -> None:
    service.start("--replicas", "1", environment=ray_cluster.environment)
    with service.client() as client:
        live(client)
    with http(service) as web:
        refused = web.get("/v1/learners")  # its header x-request-id is the proxy's own
        assert refused.status_code == 401 and refused.json()["status"] == 401
        assert refused.headers["content-type"] == "application/problem+json"
        assert "metaloom_requests_total" in web.get("/metrics").text
        assert web.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    assert replicas()
    assert service.stop() == 0
    assert not replicas() and service.readiness()[0] == 0


def test_a_replica_is_killed_and_learners_are_asked_on(
    ray_cluster: RayCluster, service: ServiceProcess
) -> None:
    """One retry of what was in work there is all that a client needs (S7)."""
    service.start("--replicas", "2", environment=ray_cluster.environment)
    # The first replica answers before the second is there; a kill before that fails the start.
    wait_until(lambda: "(2 to 2 replicas; " in service.log.read_text())
    assert len(replicas()) == 2
    with http(service, service.key()) as web:
        made = web.post("/v1/learners", json={"support": support()})
        asked = {"queries": queries()}

        def answer() -> str:
            path = f"/v1/learners/{made.json()['id']}/predict"
            found = web.post(path, json=asked)
            if found.status_code != 200:
                found = web.post(path, json=asked)
            assert found.status_code == 200, found.text
            return found.text

        before = answer()
        os.kill(replicas()[0], signal.SIGKILL)
        assert {answer() for _ in range(40)} == {before}, "the same bits from whichever replica"
        wait_until(lambda: len(replicas()) == 2)
