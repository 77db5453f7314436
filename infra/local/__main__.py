"""`python -m infra.local up|down|status`: the servers of a cluster, on this machine alone."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.local.processes import private_folder, write_private
from infra.local.servers import SERVERS, Server, servers
from pipeline.core.errors import PipelineError

TELEMETRY_OFF = {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}
USE = {
    "postgres": 'psql "$METALOOM_POSTGRES_URL"',
    "s3": "dvc remote add -d cluster $METALOOM_S3/dvc; endpoint and key are in the environment",
    "mlflow": "a browser; user and password are in cluster.env",
    "ray_head": "RAY_ADDRESS; the dashboard asks for the token in RAY_AUTH_TOKEN_PATH",
    "ray_node": "the second Ray node",
}


def main() -> None:
    """Parse, do, and report a mistake without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("servers", nargs="*", metavar="server", help=f"of {', '.join(SERVERS)}")
    default = os.environ.get("METALOOM_CLUSTER", ".metaloom/cluster")
    parser.add_argument("--folder", type=Path, default=Path(default), help=f"default: {default}")
    asked = parser.parse_args()
    if unknown := set(asked.servers) - set(SERVERS):
        parser.error(f"no such server: {', '.join(sorted(unknown))}; known: {', '.join(SERVERS)}")
    names = [name for name in SERVERS if name in (asked.servers or SERVERS)]
    try:
        done = {"up": up, "down": down, "status": status}[asked.command](asked.folder, names)
    except PipelineError as error:
        sys.exit(str(error))
    sys.exit(0 if done else 1)


def up(folder: Path, names: list[str]) -> bool:
    """Start what does not run yet; if one fails, stop those that were started here."""
    cluster = private_folder(folder)
    started: list[Server] = []
    with _alone(cluster):
        try:
            for server in servers(cluster, names):
                print(f"starting {server.name} ...", file=sys.stderr, flush=True)
                if not server.runs():
                    started.append(server)
                server.start()
        except BaseException:
            for server in reversed(started):
                server.stop()
            raise
        _write_records(cluster)
    status(folder, names)
    print(f"\nsource {folder / 'cluster.env'}   # what clients need; holds the passwords")
    return True


def down(folder: Path, names: list[str]) -> bool:
    """Stop by recorded pid; data, ports and passwords stay for the next `up`."""
    if not folder.is_dir():
        return True
    with _alone(folder.resolve()):
        for server in reversed(servers(folder, names)):
            server.stop()
        _write_records(folder.resolve())
    return True


def status(folder: Path, names: list[str]) -> bool:
    """Print a table; whether all run."""
    rows = [("server", "state", "address", "use")]
    all_run = True
    for server in servers(folder, names):
        runs = server.runs()
        all_run &= runs
        address = server.record.url if runs else "-"
        rows.append((server.name, "runs" if runs else "down", address, USE[server.name]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
    return all_run


def _write_records(cluster: Path) -> None:
    """`cluster.json` and `cluster.env` of what runs; without them where nothing does."""
    records = [server.record for server in servers(cluster) if server.runs()]
    paths = cluster / "cluster.json", cluster / "cluster.env"
    if not records:
        for path in paths:
            path.unlink(missing_ok=True)
        return
    told: dict[str, Any] = {}
    exports = {"METALOOM_CLUSTER": str(cluster), **TELEMETRY_OFF}
    for record in records:
        exports |= record.environment
        told[record.name] = {k: v for k, v in asdict(record).items() if k != "environment"}
    write_private(paths[0], json.dumps(told, indent=2) + "\n")
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()]
    write_private(paths[1], "".join(lines))


@contextmanager
def _alone(cluster: Path) -> Iterator[None]:
    """Two commands on one cluster wait for each other."""
    with (cluster / "lock").open("w") as lock:
        os.chmod(lock.name, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
