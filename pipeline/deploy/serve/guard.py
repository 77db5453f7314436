"""Before any route: who asks, how much, how fast. A request is whole before work on it begins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from pipeline.core.errors import MachineError
from pipeline.deploy.serve.keys import Caller, Keys
from pipeline.deploy.serve.problems import Problem, away, problem_body, problem_headers
from pipeline.deploy.serve.settings import ServeSettings
from pipeline.deploy.serve.traces import Traces
from pipeline.runtime.logs import say

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

GUARDED = "/v1/"
_MOST_KEYS = 10_000
_CSP = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; style-src 'self'; "
    "script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass
class _Account:
    """Of one key: a bucket of requests that fills steadily, and how many are in work."""

    tokens: float
    at: float
    in_work: int = 0


@dataclass
class Guard:
    """An ASGI application around another."""

    app: Asgi
    keys: Keys
    settings: ServeSettings
    traces: Traces
    on_answer: Callable[[str, int, float], None] = lambda route, status, seconds: None
    check_room: Callable[[], None] = lambda: None
    """Raises a Problem where work cannot be taken; asked before a body is read into pictures."""
    _accounts: dict[str, _Account] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0
        scope["request_id"] = uuid.uuid4().hex

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({**_HEADERS, "x-request-id": scope["request_id"]})
            await send(message)

        with self.traces.request(scope) as span:
            try:
                await self._pass(scope, receive, send_on)
            except Problem as problem:
                if not status:
                    await _answer(problem, scope, send_on)
            except MachineError as error:  # of the look for the key
                await _answer(away(error), scope, send_on)
            finally:
                self._tell(scope, status, time.monotonic() - begin)
                self.traces.answered(span, scope["method"], _route(scope), status)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = scope["caller"] = await self._caller(headers)
        with self._admitted(caller.key):
            body = await self._body(headers, receive)
            if scope["method"] == "POST":
                self.check_room()
            limit = self.settings.rates.answer_seconds
            try:
                await asyncio.wait_for(self.app(scope, _replay(body, receive), send), limit)
            except TimeoutError:
                detail = f"no answer within {limit:g} s. Send fewer pictures, or try again later."
                raise Problem(503, detail, retry_after=1) from None

    async def _caller(self, headers: Headers) -> Caller:
        kind, _, key = headers.get("authorization", "").partition(" ")
        caller = None
        if kind.lower() == "bearer" and key:
            found = self.keys.remembered(key)
            caller = await asyncio.to_thread(self.keys.check, key) if found == "not" else found
        if caller is None:
            detail = (
                "a valid key is needed: `Authorization: Bearer <key>`. "
                "`metaloom keys make` makes one on the service's machine."
            )
            raise Problem(HTTPStatus.UNAUTHORIZED, detail)
        return caller

    @contextlib.contextmanager
    def _admitted(self, key: str) -> Any:
        """Take one request out of the key's bucket, and count it while it is in work."""
        rates, now = self.settings.rates, time.monotonic()
        if len(self._accounts) > _MOST_KEYS:
            self._accounts = {k: a for k, a in self._accounts.items() if a.in_work}
        account = self._accounts.setdefault(key, _Account(rates.burst, now))
        filled = account.tokens + (now - account.at) * rates.requests_per_second
        account.tokens, account.at = min(float(rates.burst), filled), now
        if account.in_work >= rates.concurrent:
            detail = f"this key has {account.in_work} requests in work. Wait for some of them."
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, detail, retry_after=1)
        if account.tokens < 1:
            wait = math.ceil((1 - account.tokens) / rates.requests_per_second)
            detail = f"more than {rates.requests_per_second:g} requests a second. Slow down."
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, detail, retry_after=wait)
        account.tokens -= 1
        account.in_work += 1
        try:
            yield
        finally:
            account.in_work -= 1

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within its size and time."""
        most, seconds = self.settings.limits.body_bytes, self.settings.rates.body_seconds
        if headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "compressed bodies are not taken. Send it as it is.")
        told = headers.get("content-length", "0")
        too_large = Problem(
            413, f"a request has at most {most:,} bytes. Send fewer or smaller pictures."
        )
        if told.isdecimal() and int(told) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "the client went away.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(
                HTTPStatus.REQUEST_TIMEOUT, f"the request did not arrive within {seconds:g} s."
            ) from None

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Nothing of what was sent: the route, not the path."""
        route = _route(scope)
        self.on_answer(f"{scope['method']} {route}", status, seconds)
        caller = scope.get("caller")
        say(
            "request",
            id=scope["request_id"],
            method=scope["method"],
            route=route,
            status=str(status),
            milliseconds=round(seconds * 1000, 2),
            key=caller.key if caller else "none",
        )


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "none"))


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once; after it whatever the client does, which is to go away."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(problem: Problem, scope: Scope, send: Send) -> None:
    body = problem_body(problem.status, problem.detail, scope["path"], scope["request_id"])
    headers = problem_headers(problem.retry_after)
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    content = json.dumps(body).encode()
    headers["content-length"] = str(len(content))
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
