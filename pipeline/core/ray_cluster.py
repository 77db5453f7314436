"""The way to a Ray cluster, for those few modules that use one."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
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
    # Ray's own default for an address that was given is to ask for no token.
    "RAY_AUTH_MODE": "token",
}
"""Of Ray, unless the environment says else."""
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0, Ray lives at 127.0.0.1, instead of the network card's address and on all interfaces."""


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
    ours = address in ("", "local")
    with _closed_to_others() if ours else nullcontext():
        import ray

        if ray.is_initialized():
            yield ray
            return
        try:
            _start(ray, show_workers) if ours else _connect(ray, address, show_workers)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise _unusable(address, error) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, show_workers: bool) -> None:
    ray.init(
        address="local",
        # Without one, Ray Train complains every second that it cannot ask for its own state.
        include_dashboard=True,
        logging_level=logging.WARNING,
        configure_logging=False,
        log_to_driver=show_workers,
    )


def _connect(ray: Any, address: str, show_workers: bool) -> None:
    knock(address)
    ray.init(logging_level=logging.WARNING, configure_logging=False, log_to_driver=show_workers)


def _unusable(address: str, error: Exception) -> MachineError:
    reason = str(getattr(error, "message", error)).partition("\n")[0][:300].rstrip(".")
    return MachineError(
        f"no Ray cluster could be used at {address or 'this machine'}: {reason}. Look at "
        "RAY_ADDRESS, and at RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH: they must hold the cluster's "
        "token. A cluster that has none needs RAY_AUTH_MODE=disabled."
    )


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """What keeps a Ray of our own to this machine and to us, in the environment for as long.

    Ray would make a token itself, and leave it where everybody may read it (`~/.ray/auth_token`).
    """
    known = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    with tempfile.TemporaryDirectory(prefix="metaloom-ray-") as folder:
        set_here = {} if _ONE_MACHINE in os.environ else {_ONE_MACHINE: "0"}
        if not known and os.environ["RAY_AUTH_MODE"] == "token":
            token = Path(folder) / "token"
            token.touch(mode=0o600)
            token.write_text(_new_token())
            set_here["RAY_AUTH_TOKEN_PATH"] = str(token)
        os.environ.update(set_here)
        try:
            yield
        finally:
            for name in set_here:
                del os.environ[name]


@cache
def _new_token() -> str:
    """The same for as long as this process lives, since Ray reads it once."""
    return secrets.token_hex(32)


def knock(address: str) -> None:
    """See whether anybody is there: where nobody is, Ray's own client ends the whole process.

    Raises:
        OSError: nobody answers at this `host:port`; other forms of address are left to Ray.
    """
    if found := re.fullmatch(r"\[?([^/\[\]]+)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
