"""infra/mlflow/values.yaml: own rules, and a real server with its flags and switches."""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.mlflow_server import CLOSED
from pipeline.deploy.smoke import free_port
from tests.conftest import REPOSITORY

VALUES: dict[str, Any] = yaml.safe_load((REPOSITORY / "infra/mlflow/values.yaml").read_text())
CHART = {
    *("image", "imagePullSecrets", "fullnameOverride", "replicaCount", "deploymentStrategy"),
    *("server", "probes", "garbageCollection", "service", "ingress", "mlflow", "env", "envFrom"),
    *("extraVolumes", "extraVolumeMounts", "extraInitContainers", "extraContainers", "tls"),
    *("externalSecrets", "networkPolicy", "metrics", "serviceMonitor", "podSecurityContext"),
    *("securityContext", "serviceAccount", "namespace_rbac", "cluster_rbac", "storage"),
    *("resources", "podAnnotations", "podLabels", "nodeSelector", "tolerations", "affinity"),
}
"""Top keys of the chart's values, as read at version 0.1.1."""
PLAIN = {entry["name"]: entry["value"] for entry in VALUES["env"] if "value" in entry}
FROM_SECRET = {entry["name"]: entry["valueFrom"] for entry in VALUES["env"] if "valueFrom" in entry}


def test_the_chart_knows_every_key() -> None:
    assert set(VALUES) <= CHART
    assert set(VALUES["mlflow"]) <= {"backendStoreUriFrom", "artifactsDestination"}
    assert set(VALUES["image"]) == {"repository", "tag"}
    assert set(VALUES["server"]) == {"value_options"}


def test_no_secret_stands_in_it() -> None:
    assert set(FROM_SECRET) == {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    for reference in [*FROM_SECRET.values(), VALUES["mlflow"]["backendStoreUriFrom"]]:
        assert set(reference) == {"secretKeyRef"}
        assert reference["secretKeyRef"]["name"] == "metaloom-mlflow-server"
    assert not [name for name in PLAIN if re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", name)]
    assert not re.search(r"://[^/\s]*:[^/\s]*@", yaml.safe_dump(VALUES))
    mounted = {mount["name"]: mount for mount in VALUES["extraVolumeMounts"]}
    assert {volume["name"] for volume in VALUES["extraVolumes"]} == set(mounted)
    assert all(mount["readOnly"] for mount in mounted.values())
    for path in (PLAIN["MLFLOW_AUTH_CONFIG_PATH"], PLAIN["AWS_SHARED_CREDENTIALS_FILE"]):
        (place,) = (m for m in mounted.values() if m["mountPath"] == str(Path(path).parent))
        (volume,) = (v for v in VALUES["extraVolumes"] if v["name"] == place["name"])
        assert Path(path).name in [item["path"] for item in volume["secret"]["items"]]


def test_what_the_local_server_switches_off_is_off() -> None:
    assert {name: PLAIN[name] for name in CLOSED} == CLOSED


def test_the_pod_is_restricted_and_pinned() -> None:
    assert re.fullmatch(r"v3\.17\.\d+-full@sha256:[0-9a-f]{64}", VALUES["image"]["tag"])
    pod, container = VALUES["podSecurityContext"], VALUES["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert container["readOnlyRootFilesystem"] and not container["allowPrivilegeEscalation"]
    assert VALUES["serviceAccount"]["automountServiceAccountToken"] is False
    assert set(VALUES["resources"]["limits"]) == set(VALUES["resources"]["requests"])


def flags(port: int) -> list[str]:
    """As the chart writes them."""
    options = {**VALUES["server"]["value_options"], "host": "127.0.0.1", "port": port}
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("mlflow[auth] is not installed (make test-cluster installs it)")
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "login.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port = free_port()
    environment = {
        **PLAIN,
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "login.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-password-of-this-test",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-of-this-test",
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
    }
    command = [sys.executable, "-m", "mlflow", "server", *flags(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        begin = time.monotonic()
        while ask(url, "/health", "whoever")[0] != 200:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() - begin < 180, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, path: str, host: str, login: str = "") -> tuple[int, bytes]:
    headers = {"Host": host, "Content-Type": "application/json"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    request = urllib.request.Request(url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=5"
GOOD = "admin:a-password-of-this-test"


def test_a_server_with_these_values_asks_for_a_login(server: str) -> None:
    assert ask(server, SEARCH, "mlflow")[0] == 401
    assert ask(server, SEARCH, "mlflow", "admin:password1234")[0] == 401
    status, body = ask(server, SEARCH, "mlflow", GOOD)
    assert status == 200 and b"Default" in body


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("mlflow", 200),
        ("mlflow:5000", 200),
        ("mlflow.metaloom.svc:5000", 200),
        ("localhost:5000", 200),
        ("mlflow.example.org", 403),
        ("169.254.169.254", 403),
        ("10.0.0.7:5000", 403),
    ],
)
def test_it_answers_to_its_own_names_alone(server: str, host: str, status: int) -> None:
    assert ask(server, SEARCH, host, GOOD)[0] == status


def test_probes_need_neither_name_nor_login(server: str) -> None:
    assert ask(server, "/health", "10.0.0.7:5000")[0] == 200
