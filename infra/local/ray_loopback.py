"""`ray start` for a cluster that nobody outside this machine can reach.

Told to use 127.0.0.1, Ray takes the address of the network card instead, "so that other nodes reach
it", and listens on every interface. With that replacement left out all its servers listen on
127.0.0.1 alone (`tests/cluster/test_servers.py` looks at every socket).
"""

from __future__ import annotations

import sys

from ray._private import services
from ray.scripts.scripts import main


def _unchanged(host: str) -> str:
    return host


if __name__ == "__main__":
    if not hasattr(services, "resolve_ip_for_localhost"):
        sys.exit(
            "This version of Ray resolves addresses differently: see infra/local/ray_loopback.py"
        )
    services.resolve_ip_for_localhost = _unchanged
    main()
