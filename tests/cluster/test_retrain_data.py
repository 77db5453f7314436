"""The digest of a retraining's inputs, with DVC and a server that is a store of objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.cluster.retrain.data import inputs_of, update_imports
from tests.cluster.dvc_machines import environment, succeed


@contextmanager
def store(held: dict[str, str]) -> Iterator[str]:
    """One object, `content`, with an `etag` that need not come from it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = held["content"].encode()
            self.send_response(200)
            self.send_header("ETag", f'"{held["etag"]}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/letters"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_same_bytes_sent_again_are_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (env := environment(tmp_path, {})).items():
        monkeypatch.setenv(name, value)
    for command in ("git init --quiet", "dvc init --quiet"):
        succeed(tmp_path, env, *command.split())
    (tmp_path / "params.yaml").write_text("preprocess: {source: data/raw}\n")
    held = {"content": "one", "etag": "first"}
    with store(held) as url:
        succeed(tmp_path, env, "dvc", "import-url", "--quiet", url, "letters")
        succeed(tmp_path, env, "git", "add", ".")
        first = inputs_of(tmp_path)
        held["etag"] = "second"
        assert update_imports(tmp_path) == ["letters.dvc"]  # DVC cannot know, and asks for them
        assert inputs_of(tmp_path) == first
        held |= {"content": "two", "etag": "third"}
        assert update_imports(tmp_path) == ["letters.dvc"]
        assert inputs_of(tmp_path).data != first.data
