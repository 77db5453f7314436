"""A Ray cluster of two nodes on one machine, each of which can be killed as a whole."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra.local.processes import (
    LOOPBACK,
    Running,
    free_ports,
    http_get,
    launch,
    listens,
    private_folder,
    recorded,
    settings,
    write_private,
)
from infra.local.ray_loopback import ONE_MACHINE
from pipeline.core.errors import MachineError

NODE_LABEL = "metaloom-node"
"""Label of every node; its value is `head` or `node`."""
_FOR_CLIENTS = "[::ffff:127.0.0.1]"
"""127.0.0.1, written so that Ray's clients take it as it is: they would replace `127.0.0.1` and
`localhost` by the address of the network card, where nothing listens."""
_ATTEMPTS = 2
"""Ray ends by itself where a busy machine has not started its raylet within 30 s."""
OBJECT_STORE_BYTES = 100 * 2**20
_NODE_PORTS = (
    *("node_manager", "object_manager", "metrics", "agent_http", "agent_grpc"),
    *("runtime_env_agent",),
)
_HEAD_PORTS = (
    *("gcs", "dashboard", "client", "autoscaler_metrics", "dashboard_metrics"),
    *_NODE_PORTS,
)
_FLAGS = {
    "node_manager": "--node-manager-port",
    "object_manager": "--object-manager-port",
    "metrics": "--metrics-export-port",
    "agent_http": "--dashboard-agent-listen-port",
    "agent_grpc": "--dashboard-agent-grpc-port",
    "runtime_env_agent": "--runtime-env-agent-port",
    "gcs": "--port",
    "dashboard": "--dashboard-port",
    "client": "--ray-client-server-port",
}


def start_head(cluster: Path) -> Running:
    """Start the node that holds the cluster's state, with its dashboard."""
    folder = private_folder(cluster / "ray_head")
    known = settings(folder, lambda: _new_settings(_HEAD_PORTS))
    ports = known["ports"]
    token = folder / "token"
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    dashboard = f"http://{LOOPBACK}:{ports['dashboard']}"
    record = _record(
        "ray_head",
        folder,
        ports,
        url=dashboard,
        environment={
            "RAY_ADDRESS": f"{_FOR_CLIENTS}:{ports['gcs']}",
            "RAY_API_SERVER_ADDRESS": dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            **ONE_MACHINE,
        },
    )
    command = ["--head", "--include-dashboard=true", f"--dashboard-host={LOOPBACK}"]
    return _launch(record, command)


def start_node(cluster: Path) -> Running:
    """Start the second node; the head must run."""
    folder = private_folder(cluster / "ray_node")
    known = settings(folder, lambda: _new_settings(_NODE_PORTS))
    head = recorded(cluster / "ray_head")
    if head is None:
        raise MachineError(f"the second Ray node needs the head of {cluster}: start it first.")
    address = f"{LOOPBACK}:{head.ports['gcs']}"
    record = _record("ray_node", folder, known["ports"], url=address, environment=head.environment)
    return _launch(record, [f"--address={address}"])


def _new_settings(names: tuple[str, ...]) -> dict[str, Any]:
    return {"ports": dict(zip(names, free_ports(len(names)), strict=True))}


def _record(
    name: str, folder: Path, ports: dict[str, int], *, url: str, environment: dict[str, str]
) -> Running:
    return Running(
        name=name,
        folder=str(folder),
        ports=ports,
        url=url,
        environment=environment,
        litter=(str(_short_path(ports)),),
    )


def _short_path(ports: dict[str, int]) -> Path:
    """A link to the state folder: a socket's path has 107 bytes, of which Ray takes some 70."""
    return Path(tempfile.gettempdir()) / f"metaloom-ray-{ports['node_manager']}"


def _launch(record: Running, command: list[str]) -> Running:
    if importlib.util.find_spec("ray") is None:
        raise MachineError(
            "ray is not installed. Install the extra `ray` (pip install -e '.[ray]')."
        )
    role, ports = record.name.removeprefix("ray_"), record.ports
    cpus = os.environ.get("METALOOM_CLUSTER_CPUS", "4")
    everything = [
        *(sys.executable, "-m", "infra.local.ray_loopback", "start", "--block", *command),
        *(f"{flag}={ports[name]}" for name, flag in _FLAGS.items() if name in ports),
        *(f"--node-ip-address={LOOPBACK}", f"--num-cpus={cpus}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={_short_path(ports)}"),
        *(f"--labels={NODE_LABEL}={role}", f"--resources={json.dumps({role: 1000})}"),
        *(
            "--min-worker-port=0",
            "--max-worker-port=0",
        ),  # two nodes would share Ray's default range
        *("--disable-usage-stats", "--log-style=record"),
    ]
    for attempts_left in reversed(range(_ATTEMPTS)):
        _link(record)
        try:
            return launch(
                record,
                everything,
                environment=_environment(record),
                answers=lambda: _complete(ports) and _is_member(record, role),
            )
        except MachineError:
            if not attempts_left:
                raise
    raise AssertionError("unreachable")


def _link(record: Running) -> None:
    state = private_folder(Path(record.folder) / "state")
    short = _short_path(record.ports)
    if short.is_symlink() and short.readlink() != state:
        short.unlink()
    if not short.is_symlink():
        short.symlink_to(state)


def _complete(ports: dict[str, int]) -> bool:
    """Whether the raylet and its agents answer."""
    waited = ("node_manager", "object_manager", "agent_http", "runtime_env_agent")
    return all(listens(ports[name]) for name in waited)


def _is_member(record: Running, role: str) -> bool:
    """Whether the cluster counts the node among its own: before that, work for it would wait."""
    token = Path(record.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    url = f"{record.environment['RAY_API_SERVER_ADDRESS']}/api/v0/nodes?limit=1000"
    status, body = http_get(url, headers={"Authorization": f"Bearer {token}"})
    if status != 200:
        return False
    nodes = json.loads(body)["data"]["result"]["result"]
    alive = {node["labels"].get(NODE_LABEL) for node in nodes if node["state"] == "ALIVE"}
    return role in alive


def _environment(record: Running) -> dict[str, str]:
    """What a node has; a job brings its own variables with its runtime environment."""
    ports = record.ports
    fixed = {
        "AUTOSCALER_METRIC_PORT": str(ports.get("autoscaler_metrics", "")),
        "DASHBOARD_METRIC_PORT": str(ports.get("dashboard_metrics", "")),
    }
    repository = Path(__file__).resolve().parents[2]
    paths = [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **record.environment,
        **{name: port for name, port in fixed.items() if port},
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": record.folder,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "true",
        "RAY_enable_worker_prestart": "0",  # one idle process for each logical CPU is a heavy start
        "RAY_prestart_worker_first_driver": "0",
    }
