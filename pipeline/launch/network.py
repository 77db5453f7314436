"""Addresses: where a run's hosts meet, and by which interface this one is reached."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import sys
import time
from typing import NamedTuple

from pipeline.core.errors import ConfigError

_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_SIOCGIFADDR = 0x8915
_CLOSING_SECONDS = 2.0
"""How long the port of a run before may need to become free."""


class Endpoint(NamedTuple):
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Reach(NamedTuple):
    """How other hosts reach this one."""

    interface: str
    address: str


def parse_endpoint(text: str) -> Endpoint:
    """`host:port`.

    Raises:
        ConfigError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536) or host.startswith("-"):
        raise ConfigError(
            f"{text!r} is no address of a rendezvous. Write <host>:<port>, such as 10.0.0.5:29400."
        )
    return Endpoint(host, int(port))


def free_endpoint() -> Endpoint:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint("127.0.0.1", int(probe.getsockname()[1]))


def require_free(endpoint: Endpoint) -> None:
    """See that this host can hold the rendezvous there.

    Raises:
        ConfigError: something else listens at the port, or the address is another host's.
    """
    deadline = time.monotonic() + _CLOSING_SECONDS
    while why := _refusal(endpoint):
        if why not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            return  # whatever it is, it is not the port's fault
        if why == errno.EADDRINUSE and time.monotonic() < deadline:
            time.sleep(0.1)
            continue
        wrong = {
            errno.EADDRINUSE: f"port {endpoint.port} of this host is in use. Choose another one",
            errno.EACCES: f"port {endpoint.port} is not open to you. Choose one above 1023",
        }.get(why, f"{endpoint.host} is not an address of this host. Take one that is")
        raise ConfigError(
            f"METALOOM_RENDEZVOUS is {endpoint}, but {wrong}, and tell the hosts that join."
        )


def _refusal(endpoint: Endpoint) -> int:
    """The number of the error that listening there comes to, or 0.

    At the address, and at all of them, for that is where torch listens.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)[0]
        for place in (address, ("", endpoint.port)):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen(1)
    except (OSError, UnicodeError) as error:
        return getattr(error, "errno", None) or 0
    return 0


def interface_towards(endpoint: Endpoint, *, listening: bool) -> Reach:
    """The interface by which this host and the rendezvous's reach each other.

    Args:
        listening: the rendezvous is on this host, at that address.

    Raises:
        ConfigError: there is no way to it, or it is to be here and is not.
    """
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it asks the routing table
            own = str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"there is no way from this host to {endpoint}: {error}. Mend METALOOM_RENDEZVOUS, or "
            "the network."
        ) from None
    if listening and own != address[0] and not own.startswith("127."):
        raise ConfigError(
            f"METALOOM_RENDEZVOUS is {endpoint}, which is not an address of this host ({own}). The "
            "driver's host holds the rendezvous; the others run `metaloom join`."
        )
    return Reach(_interface_of(own), own)


def _interface_of(address: str) -> str:
    if address.startswith("127.") or not hasattr(socket, "if_nameindex"):
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return _LOOPBACK
