"""The trial's server reads from a registry that takes its time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.deploy.smoke import serve_environment
from pipeline.runtime.mlflow_tracker import quiet_environment

READ = """
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
import sys
print([one.path for one in HttpArtifactRepository(sys.argv[1]).list_artifacts()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("patient", [True, False], ids=["trial", "stages"])
def test_a_listing_that_takes_seven_seconds(patient: bool) -> None:
    """What stages ask is asked again by them; MLflow's own server asks once and ends."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(7)
            content = b'{"files": [{"path": "weights.safetensors", "is_dir": false}]}'
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts"
    quiet = quiet_environment()
    environment = serve_environment(quiet)
    if not patient:
        environment |= quiet
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ, address],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert (done.returncode == 0) == patient, done.stderr[-3000:]
    assert ("weights.safetensors" in done.stdout) == patient
