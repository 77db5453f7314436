"""The table of servers, and a cluster of them as one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.local import mlflow_server, postgres, ray_nodes, s3
from infra.local.processes import Running, kill, leader, recorded, running, stop

SERVERS: Mapping[str, Callable[[Path], Running]] = {
    "postgres": postgres.start,
    "s3": s3.start,
    "mlflow": mlflow_server.start,
    "ray_head": ray_nodes.start_head,
    "ray_node": ray_nodes.start_node,
}
"""In the order of starting; they are stopped the other way round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One server of a cluster; it keeps its ports, secrets and data over `kill` and `start`."""

    name: str
    cluster: Path

    @property
    def folder(self) -> Path:
        """State, log and secrets."""
        return self.cluster / self.name

    @property
    def record(self) -> Running:
        """Ports, pid, URL, environment: of the last start, even where it is down by now."""
        record = recorded(self.folder)
        if record is None:
            raise LookupError(f"{self.name} was never started in {self.cluster}")
        return record

    @property
    def environment(self) -> dict[str, str]:
        """What a client exports."""
        return dict(self.record.environment)

    def start(self) -> Running:
        """Start it and wait until it answers; one that runs stays as it is."""
        return SERVERS[self.name](self.cluster)

    def stop(self) -> None:
        """Ask it to end, wait, kill what stays."""
        stop(self.folder)

    def kill(self) -> None:
        """SIGKILL all its processes."""
        kill(self.folder)

    def runs(self) -> bool:
        """Whether its first process is alive."""
        return running(self.folder) is not None


def servers(cluster: Path, names: Iterable[str] = tuple(SERVERS)) -> list[Server]:
    """Handles of some servers of a cluster."""
    return [Server(name=name, cluster=cluster.resolve()) for name in names]


def leaders(cluster: Path) -> dict[str, int]:
    """Pid of every server that runs."""
    records = {server.name: recorded(server.folder) for server in servers(cluster)}
    return {name: r.pid for name, r in records.items() if r is not None and leader(r) is not None}
