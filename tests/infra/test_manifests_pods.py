"""Containers run within what their manifests allow: no root, a read-only image, no rights to gain."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infra.manifests.planted import rendered
from infra.manifests.pods import Pod, pods
from pipeline.deploy.smoke import free_port
from tests.conftest import REPOSITORY
from tests.infra.pod_root import command, why_not
from tests.unit.tiny_learner import tiny_bundle

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(180),
]
SECRETS = {
    "metaloom-git": {"credential": "username=robot\npassword=from-the-file\n"},
    "metaloom-s3": {"credentials": "[default]\naws_access_key_id = a\n"},
    "metaloom-mlflow": {"credentials": "[mlflow]\nmlflow_tracking_username = robot\n"},
    "metaloom-database": {"pg_service.conf": "[metaloom]\nhost=127.0.0.1\nport=1\nuser=a\n"},
}
_PATIENCE_SECONDS = 90.0


def pod(overlay: str, kind: str) -> Pod:
    return next(one for one in pods(rendered(overlay)) if one.kind == kind)


def within(
    tmp_path: Path, overlay: str, kind: str, script: str, image: Mapping[str, Path] | None = None
) -> subprocess.CompletedProcess[str]:
    """A shell script in the place of the container's own command."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = command(
        rendered(overlay),
        pod(overlay, kind),
        scratch=scratch,
        words=["sh", "-ec", script],
        secrets=SECRETS,
        image=image,
    )
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_container_is_as_closed_as_its_manifest_says(tmp_path: Path) -> None:
    """That the other tests of this file run in what they should."""
    script = """
    id -u; id -g
    touch /usr/a 2>/dev/null && echo wrote into the image
    touch /secrets/git/a 2>/dev/null && echo wrote into a secret
    touch /work/a /tmp/a /home/metaloom/a
    grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
    """
    done = within(tmp_path, "cpu", "CronJob", script)
    assert done.returncode == 0, done.stderr
    zeros = "0" * 16
    assert done.stdout.split() == [
        *("10001", "10001", "CapEff:", zeros, "CapBnd:", zeros, "NoNewPrivs:", "1")
    ]


def test_the_driver_clones_and_dvc_works_in_its_pod(tmp_path: Path) -> None:
    """DVC would write below /var, git into the home folder, and both must read their settings."""
    folder = tmp_path / "remote"
    folder.mkdir()
    bundle = ["git", "bundle", "create", "--quiet", str(folder / "code"), "HEAD"]
    subprocess.run(bundle, cwd=REPOSITORY, check=True)
    script = """
    git clone --quiet /opt/remote/code /work/clone
    cd /work/clone
    python -m dvc status >/dev/null
    git config user.name
    printf 'protocol=https\\nhost=git.example.org\\n\\n' | git credential fill | grep username
    python -c 'from mlflow.utils.credentials import read_mlflow_creds as r; print(r().username)'
    test -d /tmp/dvc
    """
    done = within(tmp_path, "cpu", "CronJob", script, {"/opt/remote": folder})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Metaloom", "username=robot", "robot"]


def test_the_service_finds_its_database_by_the_file(tmp_path: Path) -> None:
    script = """
    python -c '
import sqlalchemy as sa
try:
    sa.create_engine("postgresql+psycopg2:///?service=metaloom").connect()
except sa.exc.OperationalError as error:
    print(str(error.orig).splitlines()[0])
'
    """
    pytest.importorskip("psycopg2")
    done = within(tmp_path, "cpu", "Deployment", script)
    assert 'server at "127.0.0.1", port 1 failed' in done.stdout, done.stderr


def test_a_ray_head_starts_and_works_in_its_pod(tmp_path: Path) -> None:
    """With `ray start` as KubeRay calls it; the mount at /dev/shm and /tmp are all that it writes."""
    pytest.importorskip("ray")
    head = next(p for p in pods(rendered("gpu")) if p.labels.get("ray.io/node-type") == "head")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = """
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=of-this-test-alone
    python -m ray.scripts.scripts start --head --num-cpus=0 --dashboard-host=0.0.0.0 \\
        --node-ip-address=127.0.0.1 --metrics-export-port=8080 > /tmp/log 2>&1 || cat /tmp/log
    python - <<'END'
import os, ray
ray.init(address="127.0.0.1:6379", logging_level="ERROR")
print("task", ray.get(ray.remote(num_cpus=0)(lambda: (os.getuid(), os.getcwd())).remote()))
END
    """
    words = command(
        rendered("gpu"),
        head,
        scratch=scratch,
        words=["sh", "-c", script],
        secrets=SECRETS,
        alone=True,
    )
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "task (10001, '/workspace')" in done.stdout, done.stdout + done.stderr


@contextmanager
def running(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_service_becomes_ready_and_stops_in_its_pod(tmp_path: Path) -> None:
    """The whole command of the overlay `minimal`, but for a bundle, and a free port of the loopback."""
    bundle = tiny_bundle(tmp_path).folder
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    port = free_port()
    words = command(
        rendered("minimal"),
        pod("minimal", "Deployment"),
        scratch=scratch,
        instead={
            "models:/metaloom-glyphs@champion": "/opt/bundle",
            "0.0.0.0": "127.0.0.1",
            "8000": str(port),
        },
        secrets=SECRETS,
        image={"/opt/bundle": bundle},
    )
    log = tmp_path / "log"
    with running(words, log) as process:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while _status(f"http://127.0.0.1:{port}/readyz") != 200:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert _status(f"http://127.0.0.1:{port}/healthz") == 200
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return 0
