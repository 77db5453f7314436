"""What tests of the service send: small pictures, bodies, and raw bytes on a socket."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import base64_png, picture

PIXELS = 144
_PATIENCE_SECONDS = 30.0


def png(seed: int) -> bytes:
    return base64.b64decode(base64_png(picture(seed)))


def example(seed: int, label: str | int) -> dict[str, Any]:
    return {"image": base64_png(picture(seed)), "label": label}


def support(ways: int = 2, shots: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    count = ways * shots
    return [example(seed * 1000 + i, f"class {i % ways}") for i in range(count)]


def queries(count: int = 1, seed: int = 500) -> list[dict[str, Any]]:
    return [{"image": base64_png(picture(seed + i))} for i in range(count)]


def vectors(count: int, value: float = 0.0) -> list[dict[str, Any]]:
    """The shortest inputs that the tiny model takes."""
    return [{"vector": [value] * PIXELS} for _ in range(count)]


def http(service: ServiceProcess, key: str | None = None) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(
        base_url=service.url, headers=headers, timeout=_PATIENCE_SECONDS, trust_env=False
    )


def is_problem(answer: httpx.Response, status: int) -> str:
    """The detail of a problem, checked by RFC 9457."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["detail"] and body["title"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["detail"])


@dataclass(frozen=True)
class RawAnswer:
    """`status` 0: the connection was closed without a word."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def connection(service: ServiceProcess) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), _PATIENCE_SECONDS) as one:
        yield one


def answer_on(one: socket.socket) -> RawAnswer:
    """One answer whose length is told; fails where none comes in time."""
    content = b""
    while b"\r\n\r\n" not in content:
        part = one.recv(65536)
        if not part:
            return RawAnswer(0, {}, content)
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        part = one.recv(65536)
        if not part:
            break
        body += part
    return RawAnswer(int(first.split()[1]), headers, body)


def raw(service: ServiceProcess, content: bytes) -> RawAnswer:
    """The answer to bytes as they are."""
    with connection(service) as one:
        one.sendall(content)
        return answer_on(one)


def is_closed(one: socket.socket) -> bool:
    """Waits until the service has closed this connection; fails where it does not."""
    try:
        while one.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True
