"""The process: uvicorn around the application, with an end to slow headers and a clean stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.deploy.serve.guard import Asgi
from pipeline.deploy.serve.service import Service

_GRACE_SECONDS = 20
_BACKLOG = 512
_HEADER_SECONDS = 10.0


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 whose clients have ten seconds for the head of a request; uvicorn sets no end.

    So long they also have for the rest of a body after an answer that did not wait for it.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Maybe the head is whole now, or a next one has begun."""
        super().data_received(data)
        if self._is_due():
            self._expect()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Maybe before the whole request has come."""
        super().on_response_complete()
        if self._is_due() and not self.transport.is_closing():
            self._expect()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; behind an answer that has begun there is nothing to say.

        uvicorn says it all the same, and every such client is a traceback in the log.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _is_due(self) -> bool:
        """Whether it is the client's turn, and nobody else waits for it."""
        answered = self.cycle is not None and self.cycle.response_complete
        theirs = self.conn.their_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and answered)

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(_HEADER_SECONDS, self._end)

    def _end(self) -> None:
        self._late = None
        if self._is_due() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Says that it is not ready any more for a while before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On the first signal; a second one does not wait."""
        if self._service.draining or not self._service.settings.drain_seconds:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        wait = self._service.settings.drain_seconds
        timer = threading.Timer(wait, super().handle_exit, [sig, frame])
        timer.daemon = True
        timer.start()


def run(app: Asgi, service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; what is in work then is finished."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PunctualProtocol,
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again when all is done
    _Server(config, service).run()
