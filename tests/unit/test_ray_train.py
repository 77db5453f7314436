"""What the driver of a Ray run does on its own machine; Ray itself is in `tests/cluster`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.files import new_folder, verify
from pipeline.launch.base import Job
from pipeline.launch.ray_train import _bring_home, _passed_on, _presence
from pipeline.runtime.storage import Storage
from tests.distributed.entries import Plan


def test_files_of_drivers_that_were_killed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of living ones, nor of other machines, of whose processes nothing is known here."""
    monkeypatch.chdir(tmp_path)
    script = "import signal, os\nfrom pipeline.launch.ray_train import _presence\n"
    script += "with _presence(): os.kill(os.getpid(), signal.SIGKILL)"
    dead = subprocess.run([sys.executable, "-c", script], env=_with_repository(), check=False)
    (left,) = Path(".metaloom").glob("driver-*")
    assert dead.returncode < 0 and left.read_text().startswith(f"{socket.gethostname()} ")
    pid = left.read_text().split()[1]
    (other := left.with_name("driver-other")).write_text(f"not-{socket.gethostname()} {pid}")
    with _presence() as older, _presence() as newer:
        assert not left.exists()
        assert older.exists() and newer.exists() and other.exists()
    assert list(Path(".metaloom").iterdir()) == [other]


def _with_repository() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_workers_get_no_more_of_the_environment_than_they_read() -> None:
    storage = {"METALOOM_STORAGE": "s3://bucket/runs"}
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    timeout = {"METALOOM_TIMEOUT_SECONDS": "5"}
    rest = {"METALOOM_POSTGRES_URL": "postgresql://user:password@host/db", "HOME": "/root"}
    assert _passed_on({**storage, **keys, **timeout, **rest}) == {**storage, **keys, **timeout}
    assert _passed_on({**keys, **timeout, **rest}) == timeout


def _stored(storage: Storage, scratch: Path, *, sealed: bool) -> None:
    """An output as a worker leaves it in the store, whether it was a sealed folder or any other."""
    with new_folder(scratch, kind="output") as building:
        inside = building if sealed else building / "content"
        inside.mkdir(exist_ok=True)
        (inside / "new").write_text("new")
    storage.put(scratch, "outputs/a/0")


@pytest.mark.parametrize("sealed", [True, False])
def test_results_that_come_home_replace_older_ones(
    sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run has left is not mixed with them."""
    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "store").as_uri())
    storage, target = Storage((tmp_path / "store").as_uri()), tmp_path / "home" / "target"
    for _ in range(2):
        _stored(storage, tmp_path / "scratch", sealed=sealed)
        _bring_home(_job(target), "outputs/a")
        assert (target / "new").read_text() == "new" and not (target / "old").exists()
        assert not sealed or verify(target)
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert not (tmp_path / "store/outputs/a/0").exists()
        (target / "old").write_text("old")


def test_an_older_result_stays_where_the_new_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "store").as_uri())
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(StorageError, match="results in .* cannot be fetched"):
        _bring_home(_job(target), "outputs/none")
    assert (target / "old").read_text() == "old"


def test_a_store_that_does_not_let_go_of_results_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are at home by then."""

    def refuse(self: Storage, name: str) -> None:
        raise OSError("SlowDown")

    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "store").as_uri())
    _stored(Storage((tmp_path / "store").as_uri()), tmp_path / "scratch", sealed=True)
    monkeypatch.setattr(Storage, "remove", refuse)
    _bring_home(_job(tmp_path / "target"), "outputs/a")
    assert (tmp_path / "target" / "new").exists()
    assert "outputs/a/0 could not be removed (SlowDown)" in capsys.readouterr().err


def _job(target: Path) -> Job:
    return Job("", Plan(rank=0, what=""), 1, outputs=(target,))
