"""A service in a process of its own, on loopback, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline.deploy.client import Client
from pipeline.deploy.serve.keys import Keys
from pipeline.deploy.serve.learners import open_database
from pipeline.deploy.smoke import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE_SECONDS = 180.0
ALL_SCOPES = ("read", "write", "admin")


def wait_until(what: Callable[[], object]) -> float:
    """Until something is so, which a slow machine is given minutes for; the seconds that it took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < _PATIENCE_SECONDS
        time.sleep(0.02)
    return time.monotonic() - begin


class ServiceProcess:
    """`metaloom serve`, with a database and a cache in one folder."""

    def __init__(self, folder: Path, model: str, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model = folder, model
        self.database = str(settings.pop("database", f"sqlite:///{folder / 'learners.db'}"))
        own = {"database": self.database, "cache": str(folder / "versions"), **settings}
        self.config = folder / "serve.yaml"
        self.config.write_text(yaml.safe_dump({"serve": own}))
        self.log = folder / "serve.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(
        self,
        *more: str,
        ready: bool = True,
        environment: dict[str, str] | None = None,
    ) -> float:
        """Start it, with more arguments if need be; returns the seconds until it was ready."""
        begin = time.monotonic()
        arguments = ["serve", self.model, "--port", str(self.port), "--config", str(self.config)]
        arguments += more
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *arguments],
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        while ready and self.readiness()[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - begin < _PATIENCE_SECONDS, self.log.read_text()
            time.sleep(0.02)
        return time.monotonic() - begin

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /readyz; status 0 where nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError):  # a proxy before it may not know it yet
                return error.code, json.load(error)
            return error.code, {}
        except OSError:
            return 0, {}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait; returns its status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def key(self, owner: str = "tester", scopes: Iterable[str] = ALL_SCOPES, **more: Any) -> str:
        """A new key, as `metaloom keys make` makes it."""
        return Keys(open_database(self.database)).make(owner, scopes, **more)

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key or self.key())

    def events(self, event: str) -> list[dict[str, Any]]:
        """What it has logged of one kind."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [one for one in map(json.loads, lines) if one["event"] == event]

    def __enter__(self) -> ServiceProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
