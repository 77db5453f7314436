"""Hosts of a test: network namespaces with an address each, joined by one bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Host:
    """A namespace with one cable."""

    namespace: str
    cable: str
    """The end of the cable that is outside."""
    address: str
    folder: Path
    """What only this host uses: its disk."""

    def run(
        self, command: list[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Begin a command on this host."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                cwd=self.folder,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def cut_off(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")

    def connect(self) -> None:
        """Put it back."""
        _ip("link", "set", self.cable, "up")


@contextmanager
def make_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """So many hosts; the test is skipped, by name, where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    mark = uuid.uuid4().hex[:6]
    bridge = f"mlb{mark}"
    hosts: list[Host] = []
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        _ip("link", "set", bridge, "up")
        for index in range(count):
            hosts.append(_make_host(bridge, mark, index, folder / f"host-{index}"))
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", host.namespace)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", bridge)


def _make_host(bridge: str, mark: str, index: int, folder: Path) -> Host:
    folder.mkdir(parents=True)
    namespace, cable, inside = f"ml{mark}{index}", f"mlo{mark}{index}", f"mli{mark}{index}"
    address = f"10.77.{int(mark[:2], 16)}.{index + 1}"
    _ip("netns", "add", namespace)
    _ip("link", "add", cable, "type", "veth", "peer", "name", inside, "netns", namespace)
    _ip("link", "set", cable, "master", bridge)
    _ip("link", "set", cable, "up")
    for command in (
        ("addr", "add", f"{address}/24", "dev", inside),
        ("link", "set", inside, "up"),
        ("link", "set", "lo", "up"),
    ):
        _ip("-n", namespace, *command)
    return Host(namespace, cable, address, folder)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
