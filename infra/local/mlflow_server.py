"""MLflow's tracking server: a login for everything, PostgreSQL and S3 behind it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from infra.local import postgres, s3
from infra.local.processes import (
    LOOPBACK,
    Running,
    free_ports,
    http_status,
    launch,
    new_secret,
    private_folder,
    recorded,
    settings,
    write_private,
)
from pipeline.core.errors import MachineError

ADMIN = "metaloom"
CLOSED = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""What a tracking server has no need of, switched off."""


def start(cluster: Path) -> Running:
    """Start MLflow on 127.0.0.1; PostgreSQL and S3 must have been started in this cluster."""
    folder = private_folder(cluster / "mlflow")
    known = settings(folder, _new_settings)
    port = known["port"]
    url = f"http://{LOOPBACK}:{port}"
    record = Running(
        name="mlflow",
        folder=str(folder),
        ports={"server": port},
        url=url,
        environment={
            "MLFLOW_TRACKING_URI": url,
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": known["password"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        },
    )
    return launch(
        record,
        command(port),
        environment=environment(cluster, known),
        answers=lambda: http_status(f"{url}/health") == 200,
    )


def command(port: int, *, login: bool = True) -> list[str]:
    """The command line; passwords are in its environment, where other users cannot read them."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port)),
        *("--workers", "1", "--artifacts-destination", f"s3://{s3.BUCKET}/mlflow"),
        *("--allowed-hosts", f"{LOOPBACK}:{port},localhost:{port}"),
        *("--cors-allowed-origins", f"http://{LOOPBACK}:{port}", "--x-frame-options", "DENY"),
        *(["--app-name", "basic-auth"] if login else []),
    ]


def environment(cluster: Path, known: dict[str, Any]) -> dict[str, str]:
    """What the server gets: nothing of ours but the path.

    Raises:
        MachineError: PostgreSQL or S3 was never started here, or mlflow lacks its `auth` extra.
    """
    if importlib.util.find_spec("mlflow") is None or importlib.util.find_spec("flask_wtf") is None:
        raise MachineError(
            "mlflow[auth] is not installed. Install the extra `servers` (`pip install -e "
            "'.[servers]'`)."
        )
    store = recorded(cluster / "s3")
    if store is None or recorded(cluster / "postgres") is None:
        raise MachineError(f"MLflow needs PostgreSQL and S3 in {cluster}: start them first.")
    database = settings(cluster / "postgres", dict)
    # SQLAlchemy 2.1 takes a plain `postgresql://` for psycopg 3
    urls = {
        name: postgres.url_of(database, name).replace("postgresql:", "postgresql+psycopg2:", 1)
        for name in ("mlflow", "mlflow_auth")
    }
    login = private_folder(cluster / "mlflow") / "login.ini"
    write_private(
        login,
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = {urls['mlflow_auth']}\nadmin_username = {ADMIN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    )
    return {
        **CLOSED,
        **store.environment,
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(login.parent),
        "MLFLOW_BACKEND_STORE_URI": urls["mlflow"],
        "MLFLOW_AUTH_CONFIG_PATH": str(login),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["password"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known["secret_key"],
        "OMP_NUM_THREADS": "1",
    }


def _new_settings() -> dict[str, Any]:
    return {"port": free_ports(1)[0], "password": new_secret(), "secret_key": new_secret()}
