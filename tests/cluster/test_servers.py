"""The servers go up, answer, come back, and go down; nothing is left and nothing is open."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg2
import pytest

from infra.local import s3 as s3_server
from infra.local.processes import members
from infra.local.servers import Server
from tests.cluster.conftest import RayCluster


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
