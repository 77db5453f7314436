"""`ray start` for a cluster that nobody outside this machine can reach.

Told to use 127.0.0.1, Ray takes the address of the network card instead, "so that other nodes reach
it", and listens on every interface. It does not where `ONE_MACHINE` is in the environment, as on
Windows and macOS; but then `ray start` refuses a second node. So the variable is set for all
processes of the cluster, and this one, which starts a node, goes on as if it were not.
(`tests/cluster/test_servers.py` looks at every socket.)
"""

from __future__ import annotations

import sys

ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def _unchanged(host: str) -> str:
    return host


def main() -> None:
    """Start a node as `ray start` does, with addresses as they are given."""
    from ray._private import ray_constants, services
    from ray.scripts.scripts import main as ray_command

    if not hasattr(services, "resolve_ip_for_localhost"):
        sys.exit(
            "This version of Ray resolves addresses in another way: infra/local/ray_loopback.py"
        )
    services.resolve_ip_for_localhost = _unchanged
    ray_constants.ENABLE_RAY_CLUSTER = True
    ray_command()


if __name__ == "__main__":
    main()
