"""A run as the driver announces it to hosts that join, and what they answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.core.errors import MachineError
from pipeline.launch.base import Job
from pipeline.launch.network import Endpoint
from pipeline.launch.torchrun_hosts import Hosts, workers_left
from pipeline.runtime.lineage import code_hash, code_root
from pipeline.runtime.logs import say
from pipeline.runtime.noticeboard import Noticeboard

_POLL_SECONDS = 0.2
_BEGIN_SECONDS = 60.0
"""How long the agent may need to open the rendezvous."""
_PATIENCE_SECONDS = 30.0
"""How long it may need to answer then."""


class Announcement:
    """Kept up in a thread of its own: the store's calls wait where no signal is heard."""

    def __init__(
        self, endpoint: Endpoint, told: Mapping[str, Any], agent_lives: Callable[[], bool]
    ) -> None:
        self.answer: Mapping[str, str] | None = None
        """The error of a host that joined, by kind and message"""
        self.failure = ""
        """Why nobody can be told"""
        self._endpoint, self._told, self._agent_lives = endpoint, dict(told), agent_lives
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="announcement")
        self._thread.start()

    def close(self) -> None:
        """Say no more."""
        self._ended.set()
        self._thread.join(2 * _POLL_SECONDS)

    def _goes_on(self) -> bool:
        return not self._ended.wait(_POLL_SECONDS) and self._agent_lives()

    def _keep_up(self) -> None:
        deadline = time.monotonic() + _BEGIN_SECONDS
        while self._goes_on():
            if not is_open(self._endpoint) and time.monotonic() < deadline:
                continue
            try:
                board = Noticeboard.connect(*self._endpoint, patience=_PATIENCE_SECONDS)
                board.put("job", self._told)
            except MachineError as error:
                self.failure = str(error)
                return
            return self._listen(board)

    def _listen(self, board: Noticeboard) -> None:
        refused = None
        while self._goes_on() and self.answer is None:
            with contextlib.suppress(MachineError):  # it may answer the next time
                self.answer = board.get("error")
                if (latest := board.get("refused")) != refused:
                    refused = latest
                    say("host refused", why=refused)


def is_open(endpoint: Endpoint) -> bool:
    """Whether anything listens there."""
    try:
        with socket.create_connection(endpoint, timeout=1.0):
            return True
    except OSError:
        return False


def description(job: Job, hosts: Hosts, run: str) -> dict[str, Any]:
    """What a host that joins has to know."""
    kind = type(job.config)
    return {
        "run": run,
        "code": code_hash(code_root()),
        "entry": job.entry,
        "config_type": f"{kind.__module__}:{kind.__qualname__}",
        "config": job.config.model_dump(mode="json"),
        "least": hosts.least,
        "most": hosts.most,
        "workers": workers_left(job, hosts),
    }
