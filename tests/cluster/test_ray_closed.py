"""Ray without the token: no route of any port does anything (GUARANTEES M5).

HTTP routes are read from what the running servers log of themselves, gRPC methods from the compiled
programs and their generated descriptions, ports from the processes' sockets.
"""

from __future__ import annotations

import http.client
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.local import ray_nodes
from infra.local.processes import LOOPBACK, kill, members
from infra.local.servers import Server
from tests.cluster.conftest import RayCluster

grpc = pytest.importorskip("grpc", reason="grpcio is not installed (make test-cluster installs it)")

PUBLIC = {
    *("/", "/favicon.ico", "/static", "/api/authentication_mode"),  # the page that asks for a token
    "/api/authenticate",  # takes the token
    *("/api/healthz", "/api/gcs_healthz", "/api/local_raylet_healthz"),
}
"""What Ray answers without a token, on purpose: whether it lives, and the page's own files."""
METRICS_PORTS = {"metrics", "autoscaler_metrics", "dashboard_metrics"}
"""Prometheus text for whoever asks: Ray has no token for these. They listen on 127.0.0.1 alone."""
HTTP_PORTS = {"dashboard", "agent_http", "runtime_env_agent"}
GRPC_PORTS = {"gcs", "node_manager", "object_manager", "agent_grpc", "client"}
AGENT_SERVICES = {
    *("ray.rpc.ReporterService", "ray.rpc.LogService", "ray.rpc.events.EventAggregatorService"),
}
"""The agent, in Python, never answers a call of a service that it does not have."""
DESCRIPTIONS = ("gcs_service", "autoscaler", "node_manager", "reporter", "ray_client")
MORE_DESCRIPTIONS = ("events_event_aggregator_service", "core_worker", "pubsub")
READS = {
    "gcs": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "node_manager": "/ray.rpc.NodeManagerService/GetNodeStats",
    "agent_grpc": "/ray.rpc.ReporterService/GetTraceback",
}
"""One harmless method of a port, by which the right token is seen to open it."""
OPENED = {
    "dashboard": ("GET", "/api/v0/nodes"),
    "agent_http": ("POST", "/api/job_agent/jobs/"),
    "runtime_env_agent": ("POST", "/get_runtime_envs_info"),
}
"""The same by HTTP."""
NO_TOKEN: dict[str, str] = {}
NODE_ID = {"node_id": "ab" * 28}
"""Sent with every gRPC call: Ray 2.60 reads it in `RaySyncer/StartSync` *before* it looks for the
token, and ends the GCS or the raylet where it is missing. Whoever reaches these ports can stop the
cluster, token or not: that is why nothing but 127.0.0.1 (or the job's own network) may reach them.
"""


@dataclass(frozen=True)
class Port:
    node: str
    name: str
    number: int


@dataclass(frozen=True)
class Method:
    path: str
    client_streams: bool = False
    server_streams: bool = False


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def ports_of(*servers: Server) -> list[Port]:
    return [
        Port(server.name, name, number)
        for server in servers
        for name, number in server.record.ports.items()
    ]


# ------------------------------------------------------------------------------------------ HTTP


def http_routes(server: Server, name: str) -> list[tuple[str, str]]:
    """(method, path) of every route of a port, as its server registered them."""
    logs = server.folder / "state" / "session_latest" / "logs"
    if name == "runtime_env_agent":
        main = importlib.import_module("ray._private.runtime_env.agent.main")
        assert main.__file__ is not None
        text = Path(main.__file__).read_text()
        found = re.findall(r'router\.add_(\w+)\(\s*"([^"]+)"', text)
        assert len(found) == text.count("router.add_")
        return [(method.upper(), path) for method, path in found]
    log = logs / {"dashboard": "dashboard.log", "agent_http": "dashboard_agent.log"}[name]
    pattern = r"<ResourceRoute \[(\w+)\] <\w+Resource\s+(\S+?)>? ->"
    found = re.findall(pattern, log.read_text())
    registered = int(re.findall(r"Registered (\d+) routes", log.read_text())[-1])
    assert len(found) == registered, "the log's form has changed"
    return found


def ask(port: int, method: str, path: str, headers: dict[str, str], seconds: float = 60) -> int:
    """The status of an answer; 0 where none comes, because the route is at work."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=seconds)
    try:
        connection.request(method, re.sub(r"\{[^}]*\}", "x", path), headers=headers)
        return connection.getresponse().status
    except TimeoutError:
        return 0
    finally:
        connection.close()


def http_sweep(
    servers: list[Server], headers: dict[str, str], *, only: str = "", seconds: float = 60
) -> dict[tuple[str, str, str, str], int]:
    """Status by (node, port, method, path); `only` one method, if given."""
    targets = [
        (port, method, path)
        for server in servers
        for port in ports_of(server)
        if port.name in HTTP_PORTS
        for method, path in http_routes(server, port.name)
        if only in {"", method}
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda t: ask(t[0].number, t[1], t[2], headers, seconds), targets)
        return {
            (port.node, port.name, method, path): status
            for (port, method, path), status in zip(targets, answers, strict=True)
        }


def not_refused(
    answers: dict[tuple[str, str, str, str], int], refusal: int
) -> list[tuple[tuple[str, str, str, str], int]]:
    return [
        (k, status) for k, status in answers.items() if k[3] not in PUBLIC and status != refusal
    ]


# ------------------------------------------------------------------------------------------ gRPC


def grpc_methods() -> list[Method]:
    """Every method that Ray's programs name, with its kind where a description is at hand."""
    described = {}
    for name in (*DESCRIPTIONS, *MORE_DESCRIPTIONS):
        module = importlib.import_module(f"ray.core.generated.{name}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                kind = Method(path, method.client_streaming, method.server_streaming)
                described[path] = kind
    ray = importlib.import_module("ray")
    core = Path(ray.__file__).parent / "core" / "src" / "ray"
    compiled: set[str] = set()
    for program in (core / "raylet" / "raylet", core / "gcs" / "gcs_server"):
        found = re.findall(rb"/ray\.rpc\.[\w.]+/\w+", program.read_bytes())
        assert found, program
        compiled |= {path.decode() for path in found}
    return [described.get(path, Method(path)) for path in sorted(compiled | set(described))]


def call(channel: object, method: Method, headers: dict[str, str]) -> str:
    """The status code of a call with an empty message."""
    kind = f"{'stream' if method.client_streams else 'unary'}_"
    kind += "stream" if method.server_streams else "unary"
    message = iter([b""]) if method.client_streams else b""
    try:
        reply = getattr(channel, kind)(method.path)(
            message, metadata=tuple((headers | NODE_ID).items()), timeout=30
        )
        if method.server_streams:
            next(iter(reply), None)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def grpc_sweep(ports: list[Port], headers: dict[str, str]) -> dict[tuple[Port, str], str]:
    methods = grpc_methods()
    of_agent = [m for m in methods if m.path.split("/")[1] in AGENT_SERVICES]

    def one(port: Port) -> dict[tuple[Port, str], str]:
        asked = of_agent if port.name == "agent_grpc" else methods
        with grpc.insecure_channel(f"{LOOPBACK}:{port.number}") as channel:
            return {(port, method.path): call(channel, method, headers) for method in asked}

    with ThreadPoolExecutor(4) as pool:
        return {k: v for answers in pool.map(one, ports) for k, v in answers.items()}


def told(answers: dict[object, object]) -> str:
    counts = Counter(map(str, answers.values()))
    return ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))


# ------------------------------------------------------------------------------------------ tests

DRIVER = """
import ray, sys
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
class Worker:
    def here(self):
        return "here"

workers = [Worker.options(resources={role: 1}).remote() for role in ("head", "node")]
print(ray.get([worker.here.remote() for worker in workers]), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def token(ray_cluster: RayCluster) -> str:
    return Path(ray_cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()


@pytest.fixture(scope="module")
def work(ray_cluster: RayCluster) -> Iterator[psutil.Process]:
    """A driver with a worker on each node, so that their ports are there to be swept."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, **ray_cluster.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with driver:
        assert driver.stdout is not None and driver.stdin is not None
        assert "here" in driver.stdout.readline()
        yield psutil.Process(driver.pid)
        driver.stdin.close()
        driver.wait(60)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of every socket on which a process takes connections."""
    sockets = process.net_connections(kind="inet")
    return {
        (s.laddr.ip.removeprefix("::ffff:"), s.laddr.port) for s in sockets if s.status == "LISTEN"
    }


def worker_ports(ray_cluster: RayCluster, driver: psutil.Process) -> list[Port]:
    """Ports of the workers and of the driver: Ray draws them at random."""
    found = [Port("driver", "worker", number) for _, number in listening(driver)]
    for server in (ray_cluster.head, ray_cluster.node):
        known = set(server.record.ports.values())
        for process in members(server.record):
            if process.name().startswith("ray::Worker"):
                found += [
                    Port(server.name, "worker", number)
                    for _, number in listening(process)
                    if number not in known
                ]
    return found


def test_the_open_ports_are_the_documented_ones(
    ray_cluster: RayCluster, work: psutil.Process
) -> None:
    """Each named port is open on 127.0.0.1, and no process listens anywhere else."""
    workers = worker_ports(ray_cluster, work)
    assert {port.node for port in workers} == {"driver", "ray_head", "ray_node"}
    for server in (ray_cluster.head, ray_cluster.node):
        sockets = {s for process in members(server.record) for s in listening(process)}
        of_workers = {port.number for port in workers if port.node == server.name}
        documented = set(server.record.ports.values()) | of_workers
        assert sockets == {(LOOPBACK, number) for number in documented}
    known = {port.name for port in ports_of(ray_cluster.head, ray_cluster.node)}
    assert known == HTTP_PORTS | GRPC_PORTS | METRICS_PORTS


def test_http_needs_the_token(ray_cluster: RayCluster, token: str) -> None:
    """Every route of dashboard and agents: 401 without, 403 with a wrong token."""
    servers = [ray_cluster.head, ray_cluster.node]
    without = http_sweep(servers, NO_TOKEN)
    wrong = http_sweep(servers, bearer("0" * len(token)))
    shorter = http_sweep(servers, bearer(token[:-1]))
    assert not_refused(without, 401) == []
    assert not_refused(wrong, 403) == []
    assert not_refused(shorter, 403) == []
    assert {port for _, port, _, _ in without} == HTTP_PORTS
    for port in ports_of(*servers):
        if port.name in OPENED:
            assert ask(port.number, *OPENED[port.name], bearer(token)) not in {0, 401, 403}, port
    for name, answers in (("no", without), ("wrong", wrong), ("cut", shorter)):
        print(f"\nRay HTTP, {name} token: {len(answers)} routes: {told(dict(answers))}")


def test_a_token_in_another_place_is_checked_too(ray_cluster: RayCluster, token: str) -> None:
    port = ray_cluster.head.record.ports["dashboard"]
    for headers, status in (
        ({"x-ray-authorization": f"Bearer {token}"}, 200),
        ({"cookie": f"ray-authentication-token={token}"}, 200),
        ({"x-ray-authorization": "Bearer 0"}, 403),
        ({"cookie": "ray-authentication-token=0"}, 403),
        ({"authorization": token}, 403),
        ({"authorization": "Basic eDp4"}, 403),
    ):
        assert ask(port, "GET", "/api/v0/nodes", headers) == status, headers
    for path in ("/static/../api/v0/nodes", "//api/v0/nodes", "/static/%2e%2e/api/v0/nodes"):
        assert ask(port, "GET", path, NO_TOKEN) in {401, 403, 404}, path


def test_grpc_needs_the_token(ray_cluster: RayCluster, work: psutil.Process, token: str) -> None:
    """Every method that Ray knows, at every gRPC port: refused, or not served there at all."""
    named = ports_of(ray_cluster.head, ray_cluster.node)
    ports = [port for port in named if port.name in GRPC_PORTS] + worker_ports(ray_cluster, work)
    for name, headers in (("no", NO_TOKEN), ("wrong", bearer("0" * len(token)))):
        answers = grpc_sweep(ports, headers)
        codes = {"UNAUTHENTICATED", "UNIMPLEMENTED"}
        assert [(k, code) for k, code in answers.items() if code not in codes] == []
        for port in ports:
            assert "UNAUTHENTICATED" in {c for (at, _), c in answers.items() if at == port}, port
        print(
            f"\nRay gRPC, {name} token: {len(answers)} calls, {len(ports)} ports: "
            f"{told(dict(answers))}"
        )
    for port in named:
        if port.name in READS:
            with grpc.insecure_channel(f"{LOOPBACK}:{port.number}") as channel:
                assert call(channel, Method(READS[port.name]), bearer(token)) == "OK", port


def test_a_driver_without_the_token_is_refused(ray_cluster: RayCluster) -> None:
    environment = {**os.environ, **ray_cluster.environment}
    environment["RAY_AUTH_TOKEN_PATH"] = os.devnull
    done = subprocess.run(
        [sys.executable, "-c", "import ray; ray.init()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0 and "token" in done.stderr.lower()


def test_the_token_is_private(ray_cluster: RayCluster, token: str) -> None:
    path = Path(ray_cluster.environment["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o777 == 0o600 and len(token) == 64
    for server in (ray_cluster.head, ray_cluster.node):
        for process in members(server.record):
            assert token not in " ".join(process.cmdline())
    assert not (ray_cluster.head.folder / ".ray" / "auth_token").exists()


@pytest.fixture
def open_head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A head node with the token switched off."""
    closed: Callable[..., dict[str, str]] = ray_nodes._environment
    monkeypatch.setattr(
        ray_nodes, "_environment", lambda record: {**closed(record), "RAY_AUTH_MODE": "disabled"}
    )
    with tempfile.TemporaryDirectory(prefix="metaloom-open-") as folder:
        server = Server(name="ray_head", cluster=Path(folder))
        server.start()
        yield server
        kill(server.folder)


def test_the_sweep_finds_an_open_cluster(open_head: Server) -> None:
    """Without authentication the same sweep reports open routes at every HTTP port, and the GCS."""
    answers = http_sweep([open_head], NO_TOKEN, only="GET", seconds=10)
    opened = not_refused(answers, 401)
    assert {port for (_, port, _, _), _ in opened} >= {"dashboard", "agent_http"}
    gcs = open_head.record.ports["gcs"]
    with grpc.insecure_channel(f"{LOOPBACK}:{gcs}") as channel:
        assert call(channel, Method(READS["gcs"]), NO_TOKEN) == "OK"
    print(f"\nRay with its token off: {len(opened)} of {len(answers)} GET routes are open")
