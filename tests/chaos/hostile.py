"""A proxy before a real server that does what networks and dying servers do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("refuse", "hang", "500", "lost")
"""Close the connection; never answer; answer with an error; do what was asked, lose the answer."""
_KEPT_HEADERS = ("Content-Type", "Content-Length", "Authorization", "Content-Disposition")
_HANG_SECONDS = 300.0


class Hostile:
    """Forwards to `behind`; what it does instead is set at any moment by `mode`."""

    def __init__(self, behind: str) -> None:
        self.mode = "pass"
        self.calls: list[str] = []
        """Every `METHOD path`, in the order of arrival."""
        self.pass_first: tuple[str, int] | None = None
        """With a mode other than `pass`: let so many calls whose path holds this text through."""
        self.on_call: Callable[[int], None] | None = None
        """Told the number of every call before it is answered, from 1."""
        self.only: str | None = None
        """With a mode other than `pass`: spare calls whose `METHOD path` does not hold this."""
        self._behind = urlsplit(behind).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._open = threading.Event()
        self._lock = threading.Lock()

    def count(self, text: str) -> int:
        """Calls so far whose `METHOD path` holds a text."""
        return sum(text in call for call in self.calls)

    def recover(self) -> None:
        """Pass everything again, and let go of those that hang."""
        self.mode, self.pass_first, self.only, self.on_call = "pass", None, None, None
        self._open.set()
        self._open = threading.Event()

    @contextmanager
    def serving(self) -> Iterator[Hostile]:
        """Listen for the body."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.recover()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _fault(self, call: str) -> str:
        with self._lock:
            self.calls.append(call)
            if self.only is not None and self.only not in call:
                return "pass"
            if self.pass_first is not None and self.pass_first[0] in call:
                text, left = self.pass_first
                self.pass_first = (text, left - 1)
                if left > 0:
                    return "pass"
            elif self.pass_first is not None and self.pass_first[1] > 0:
                return "pass"
            return self.mode

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> Any:
        connection = http.client.HTTPConnection(self._behind, timeout=60)
        headers = {k: v for k in _KEPT_HEADERS if (v := handler.headers.get(k)) is not None}
        try:
            connection.request(handler.command, handler.path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = outer._fault(f"{self.command} {self.path}")
                if outer.on_call is not None:
                    outer.on_call(len(outer.calls))
                if fault == "hang":
                    outer._open.wait(_HANG_SECONDS)
                if fault in {"refuse", "hang"}:
                    self.close_connection = True
                    return
                try:
                    status, headers, content = outer._forward(self, body)
                except OSError:  # the real server is down: so is this one
                    self.close_connection = True
                    return
                if fault == "lost":
                    self.close_connection = True
                    return
                if fault == "500":
                    status, headers, content = 500, [], b"made up"
                try:
                    self.send_response(status)
                    for name, value in headers:
                        if name in {"Content-Type", "Content-Disposition"}:
                            self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):  # who asked was killed
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                return

        for method in ("GET", "POST", "PATCH", "PUT", "DELETE", "HEAD"):
            setattr(Handler, f"do_{method}", Handler.answer)
        return Handler


def wait_until(happened: Any, seconds: float, what: str) -> None:
    """Look again and again, and fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
