"""The way to a Ray cluster, for those few modules that use one."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.core.errors import MachineError

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    # A report waits until the one before it was looked at; with Ray's 2 s that would be felt.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}
"""Of Ray, unless the environment says else."""


@contextmanager
def ray_cluster(*, show_workers: bool) -> Iterator[Any]:
    """Ray, connected to RAY_ADDRESS or started on this machine; what we connect, we disconnect.

    Args:
        show_workers: whether what the workers print comes to this terminal.

    Raises:
        MachineError: Ray is not installed, or there is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise MachineError(
            "METALOOM_LAUNCHER is ray_train, but Ray is not installed. Install it: "
            "pip install 'metaloom[ray]'."
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "")
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        _knock(address)
        ray.init(
            address=None if address else "local",
            # Without one, Ray Train complains every second that it cannot ask for its own state.
            include_dashboard=None if address else True,
            logging_level=logging.WARNING,
            configure_logging=False,
            log_to_driver=show_workers,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:300].rstrip(".")
        raise MachineError(
            f"no Ray cluster could be used at {address or 'this machine'}: {reason}. Look at "
            "RAY_ADDRESS, and at RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See whether anybody is there: where nobody is, Ray's own client ends the whole process.

    Raises:
        OSError: nobody answers at this `host:port`; other forms of address are left to Ray.
    """
    if found := re.fullmatch(r"\[?([^/\[\]]+)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
