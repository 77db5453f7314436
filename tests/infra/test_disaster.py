"""Everything is lost; from the backup that docs/kubernetes.md describes the same champion serves.

Real parts: an MLflow server, the service, DVC, git; SQLite or PostgreSQL with its own tools.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from infra.local import postgres as postgres_server
from infra.local.processes import settings
from infra.local.servers import Server
from pipeline.core.errors import MachineError
from pipeline.deploy.registry import Registry
from pipeline.deploy.smoke import free_port
from tests.serve.asking import http, queries, support
from tests.serve.registered import NAME, register
from tests.serve.service_process import ServiceProcess

_PATIENCE_SECONDS = 180.0


class Databases(Protocol):
    """Two databases of one site."""

    def url(self, name: str) -> str:
        """As SQLAlchemy wants it."""

    def back_up(self, name: str, target: Path) -> None:
        """While it is in use."""

    def restore(self, name: str, source: Path) -> None:
        """Into an empty one."""


@dataclass(frozen=True)
class SQLite:
    """Files in a folder."""

    folder: Path

    def path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.db"

    def url(self, name: str) -> str:
        return f"sqlite:///{self.path(name)}"

    def back_up(self, name: str, target: Path) -> None:
        with closing(sqlite3.connect(self.path(name))) as here:
            here.execute("VACUUM INTO ?", (str(target),))

    def restore(self, name: str, source: Path) -> None:
        shutil.copy(source, self.path(name))


@dataclass(frozen=True)
class PostgreSQL:
    """A server of its own; `metaloom` holds the learners, `mlflow` the registry."""

    server: Server

    @property
    def known(self) -> dict[str, Any]:
        return settings(Path(self.server.record.folder), dict)

    def url(self, name: str) -> str:
        plain = postgres_server.url_of(self.known, {"learners": "metaloom"}.get(name, name))
        return plain.replace("postgresql:", "postgresql+psycopg2:", 1)

    def _tool(self, tool: str, name: str, *arguments: str) -> None:
        url = self.url(name).replace("+psycopg2", "", 1)
        command = [f"{self.known['binaries']}/{tool}", f"--dbname={url}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def back_up(self, name: str, target: Path) -> None:
        self._tool("pg_dump", name, "--format=custom", f"--file={target}")

    def restore(self, name: str, source: Path) -> None:
        self._tool("pg_restore", name, "--no-owner", "--exit-on-error", str(source))


class Site:
    """MLflow with its artefacts, a service, and a DVC remote."""

    def __init__(self, folder: Path, databases: Databases) -> None:
        folder.mkdir(parents=True)
        self.folder, self.databases = folder, databases
        self.artefacts, self.remote = folder / "artefacts", folder / "remote"
        self.port = free_port()
        self.tracking = f"http://127.0.0.1:{self.port}"
        self.mlflow: subprocess.Popen[bytes] | None = None
        self.service = ServiceProcess(
            folder / "service", NAME, database=databases.url("learners"), poll_seconds=1
        )

    def start_mlflow(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--artifacts-destination", str(self.artefacts)]
        own = {
            "MLFLOW_BACKEND_STORE_URI": self.databases.url("mlflow"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        log = self.folder / "mlflow.log"
        with log.open("wb") as out:
            self.mlflow = subprocess.Popen(
                command,
                env={**os.environ, **own},
                cwd=self.folder,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        begin = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"{self.tracking}/health", timeout=5).close()
                return
            except OSError:
                assert self.mlflow.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() - begin < _PATIENCE_SECONDS, log.read_text()[-3000:]
                time.sleep(0.3)

    def start_service(self, *, ready: bool = True) -> None:
        self.service.start(ready=ready, environment={"MLFLOW_TRACKING_URI": self.tracking})

    def back_up(self, target: Path) -> None:
        """The databases first: what they name is in the artefacts, which are only added to."""
        target.mkdir()
        for name in ("mlflow", "learners"):
            self.databases.back_up(name, target / name)
        shutil.copytree(self.artefacts, target / "artefacts")
        shutil.copytree(self.remote, target / "remote")

    def restore(self, source: Path) -> None:
        for name in ("mlflow", "learners"):
            self.databases.restore(name, source / name)
        shutil.copytree(source / "artefacts", self.artefacts)
        shutil.copytree(source / "remote", self.remote)

    def end(self, number: int = signal.SIGTERM) -> None:
        service = self.service.process
        if service is not None and service.poll() is None:
            service.send_signal(number)
            service.wait(60)
        if self.mlflow is not None and self.mlflow.poll() is None:
            os.killpg(self.mlflow.pid, number)  # MLflow's server has a child that answers
            self.mlflow.wait(60)


def run(*command: str, cwd: Path) -> str:
    own = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    who = {
        f"GIT_{role}_{what}": "t@example.org"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, **who},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(*arguments: str, cwd: Path) -> str:
    return run(sys.executable, "-m", "dvc", *arguments, cwd=cwd)


def push_data(repository: Path, remote: Path) -> bytes:
    """A repository whose data is on the remote; returns the data."""
    repository.mkdir()
    data = os.urandom(5000)
    run("git", "init", "-q", cwd=repository)
    dvc("init", "-q", cwd=repository)
    (repository / "data").mkdir()
    (repository / "data" / "shard.arrow").write_bytes(data)
    dvc("add", "-q", "data", cwd=repository)
    dvc("remote", "add", "--default", "storage", str(remote), cwd=repository)
    dvc("remote", "modify", "storage", "verify", "true", cwd=repository)
    dvc("push", "-q", cwd=repository)
    run("git", "add", "-A", cwd=repository)
    run("git", "commit", "-q", "-m", "data", cwd=repository)
    return data


@pytest.fixture(
    params=[pytest.param(kind, marks=pytest.mark.slow) for kind in ("sqlite", "postgresql")]
)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Databases, Databases]]:
    """The databases of the site that is lost, and of the one that is made anew."""
    if request.param == "sqlite":
        yield SQLite(tmp_path / "databases-1"), SQLite(tmp_path / "databases-2")
        return
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed (extra `servers`)")
    try:
        postgres_server.find_binaries()
    except MachineError as error:
        pytest.skip(str(error))
    # Not in pytest's folder, which bars the way to the user that PostgreSQL runs as under root.
    folders = [Path(tempfile.mkdtemp(prefix="metaloom-disaster-")) for _ in range(2)]
    servers = [Server(name="postgres", cluster=folder) for folder in folders]
    try:
        for server in servers:
            server.start()
        yield PostgreSQL(servers[0]), PostgreSQL(servers[1])
    finally:
        for server, folder in zip(servers, folders, strict=True):
            server.stop()
            shutil.rmtree(folder)


@pytest.mark.timeout(900)
def test_the_same_champion_serves_from_a_backup(
    places: tuple[Databases, Databases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Site(tmp_path / "first", places[0])
    second = Site(tmp_path / "second", places[1])
    backup, repository = tmp_path / "backup", tmp_path / "repository"
    try:
        first.start_mlflow()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", first.tracking)
        for seed in range(3):
            register(tmp_path, seed)
        registry = Registry(tmp_path, NAME)
        registry.promote(registry.version(1), reason="the first")
        registry.promote(registry.version(2), reason="a better one")
        first.start_service()
        key = first.service.key()
        with http(first.service, key) as client:
            made = client.post("/v1/learners", json={"support": support()})
            learner = made.json()["id"]
            path = f"/v1/learners/{learner}"
            before = client.post(f"{path}/predict", json={"queries": queries(5)})
            described = client.get(path).json()
            model = client.get("/v1/model").json()
        assert before.status_code == 200 and model["champion"]["version"] == 2, model
        data = push_data(repository, first.remote)
        first.back_up(backup)

        first.end(signal.SIGKILL)
        shutil.rmtree(first.folder)
        shutil.rmtree(repository / ".dvc" / "cache")

        second.restore(backup)
        second.start_mlflow()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", second.tracking)
        registry = Registry(tmp_path, NAME)
        champion = registry.champion()
        assert champion is not None and champion.number == 2
        assert [one.reason for one in registry.promotions()] == ["the first", "a better one"]
        second.start_service()
        with http(second.service, key) as client:
            after = client.post(f"{path}/predict", json={"queries": queries(5)})
            assert client.get(path).json() == described
            assert client.get("/v1/model").json()["champion"] == model["champion"]
        assert after.content == before.content

        fresh = tmp_path / "fresh"
        run("git", "clone", "-q", str(repository), str(fresh), cwd=tmp_path)
        dvc("remote", "modify", "--local", "storage", "url", str(second.remote), cwd=fresh)
        dvc("pull", "-q", cwd=fresh)
        assert (fresh / "data" / "shard.arrow").read_bytes() == data

        _a_damaged_backup_is_not_served(second)
    finally:
        first.end()
        second.end()


def _a_damaged_backup_is_not_served(site: Site) -> None:
    """One bit of the champion's weights, and no cache that has them whole."""
    assert site.service.stop() == 0
    shutil.rmtree(site.service.folder / "versions")
    weights = sorted(site.artefacts.rglob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    site.start_service(ready=False)
    begin = time.monotonic()
    while not (answer := site.service.readiness()[1].get("problems")):
        assert time.monotonic() - begin < _PATIENCE_SECONDS, site.service.log.read_text()
        time.sleep(0.2)
    assert site.service.readiness()[0] == 503
    assert "version 2" in " ".join(answer), json.dumps(answer)
