"""Copies of checkpoints in a store: whole or not seen, and never in the way of training."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import ConfigError, StorageError, TrainingError
from pipeline.core.files import MANIFEST, new_folder, sha256_file, verify
from pipeline.runtime import mirror
from pipeline.runtime.checkpoint import load_checkpoint, newest_step, save_checkpoint
from pipeline.runtime.context import SINGLE
from pipeline.runtime.mirror import Mirror, Storage
from pipeline.runtime.resume import Keeper
from tests.unit.quadratic import Quadratic
from tests.unit.test_loop_guards import train


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where METALOOM_STORAGE points to: a mounted disk that is not there yet."""
    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "mounted" / "store").as_uri())
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 0.02)
    return tmp_path / "mounted" / "store"


def save(folder: Path, step: int) -> None:
    tensors = {"vector": torch.full((64,), float(step))}
    save_checkpoint(folder, step, tensors, {"progress": {"step": step}})


def kept_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*"))


def wait_until(seen: Path, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not seen.exists():
        assert time.monotonic() < until, f"{seen} never came"
        time.sleep(0.01)


def filled(remote: Path, folder: Path, *steps: int) -> Path:
    """A store that a run has filled; returns the run's folder in it."""
    for step in steps:
        save(folder, step)
        Mirror(folder, Storage(remote.as_uri())).upload()
    return remote / "checkpoints" / folder.name


def test_checkpoints_are_copied_beside_the_work_and_two_are_kept(
    remote: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with Keeper(folder, SINGLE) as keeper:
        assert keeper.resume() is None
        for step in (10, 20, 30):
            keeper.save(step, {"vector": torch.ones(9) * step}, {"progress": {"step": step}})
            wait_until(remote / "checkpoints" / "run" / f"step-{step:08d}" / MANIFEST)
    there = remote / "checkpoints" / "run"
    assert kept_in(there) == kept_in(folder) == ["step-00000020", "step-00000030"]
    for name in kept_in(folder):
        assert verify(there / name) == verify(folder / name)


def test_the_last_checkpoint_is_there_when_the_run_ends(remote: Path, tmp_path: Path) -> None:
    with Keeper(tmp_path / "run", SINGLE) as keeper:
        keeper.resume()
        keeper.save(10, {"vector": torch.ones(9)}, {"progress": {"step": 10}})
    assert kept_in(remote / "checkpoints" / "run") == ["step-00000010"]


def test_a_run_goes_on_from_the_store_on_a_machine_that_has_nothing(
    remote: Path, tmp_path: Path
) -> None:
    program = Quadratic({(33, 1): float("nan")}, noise=0.3)
    with pytest.raises(TrainingError, match="non-finite"):
        train(tmp_path / "a", program)
    shutil.rmtree(tmp_path / "a")
    saved = remote / "checkpoints" / "checkpoints"
    assert kept_in(saved)[-1] == "step-00000030"  # the one before it depends on the disk's speed
    resumed = train(tmp_path / "a", Quadratic(noise=0.3))
    shutil.rmtree(saved)
    straight = train(tmp_path / "b", Quadratic(noise=0.3))
    assert torch.equal(resumed.vector, straight.vector)
    assert resumed.progress == straight.progress


@pytest.mark.parametrize("first", [True, False])
def test_a_store_that_refuses_costs_nothing_and_is_named(
    first: bool,
    remote: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A file in the way of every write, from the beginning or from the third checkpoint on."""
    monkeypatch.setattr(mirror, "_FLUSH_SECONDS", 0.3)
    folder = tmp_path / "run"

    def block() -> None:
        shutil.rmtree(remote, ignore_errors=True)
        remote.parent.mkdir(exist_ok=True)
        remote.write_text("in the way")

    with Keeper(folder, SINGLE) as keeper:
        keeper.resume()
        for step in (10, 20, 30, 40):
            if step == (10 if first else 30):
                block()
            keeper.save(step, {"vector": torch.ones(9) * step}, {"progress": {"step": step}})
            time.sleep(0.1)
    said = capfd.readouterr().err
    assert said.count("takes no checkpoint") == 1, "said once, not at every try"
    assert f"did not take the last checkpoint; {folder} keeps it" in said
    assert newest_step(folder) == 40
    remote.unlink()
    assert mirror.upload_checkpoints(tmp_path) == ["run"]
    assert kept_in(remote / "checkpoints" / "run") == ["step-00000040"]


def test_a_store_that_answers_again_gets_what_it_missed(
    remote: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with Keeper(folder, SINGLE) as keeper:
        keeper.resume()
        remote.parent.mkdir(exist_ok=True)
        remote.write_text("in the way")
        keeper.save(10, {"vector": torch.ones(9)}, {"progress": {"step": 10}})
        time.sleep(0.2)
        remote.unlink()
        wait_until(remote / "checkpoints" / "run" / "step-00000010" / MANIFEST)
    said = capfd.readouterr().err
    assert "takes no checkpoint" in said and "did not take the last" not in said


def test_after_a_fault_nobody_waits_for_a_store(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are started again at once; the next start uploads what this one did not."""
    waited: list[float] = []
    monkeypatch.setattr(
        mirror.threading.Thread, "join", lambda self, seconds: waited.append(seconds)
    )
    for error, flushes in ((RuntimeError("peer gone"), 0), (TrainingError("the end"), 1)):
        waited.clear()
        with pytest.raises(type(error)), Keeper(tmp_path / "run", SINGLE) as keeper:
            keeper.resume()
            raise error
        assert len(waited) == flushes


@pytest.mark.parametrize(("local", "found"), [(None, 20), (10, 20), (20, 20), (30, 30)])
def test_the_newer_of_store_and_machine_is_resumed(
    local: int | None, found: int, remote: Path, tmp_path: Path
) -> None:
    filled(remote, tmp_path / "before" / "run", 10, 20)
    folder = tmp_path / "run"
    if local is not None:
        save(folder, local)
    with Keeper(folder, SINGLE) as keeper:
        saved = keeper.resume()
    assert saved is not None
    assert saved.state["progress"]["step"] == found
    assert bool((saved.tensors["vector"] == found).all())


@pytest.mark.parametrize("damage", ["flip", "cut", "lost", "foreign", "renamed"])
def test_a_damaged_copy_is_refused_by_name_and_the_one_before_is_used(
    damage: str, remote: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = filled(remote, tmp_path / "before" / "run", 10, 20) / "step-00000020"
    victim = there / "tensors.safetensors"
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-3] ^= 4
        victim.write_bytes(content)
    elif damage == "cut":
        os.truncate(victim, 100)
    elif damage == "lost":
        victim.unlink()
    elif damage == "foreign":
        save(tmp_path / "other", 20)
        shutil.rmtree(there)
        shutil.copytree(tmp_path / "other" / "step-00000020", there)
    else:
        there.rename(there.with_name("step-00000030"))
    with Keeper(tmp_path / "run", SINGLE) as keeper:
        saved = keeper.resume()
    assert saved is not None
    assert saved.state["progress"]["step"] == 10
    name = "step-00000030" if damage == "renamed" else "step-00000020"
    assert f"checkpoint {name} of {remote.as_uri()} not used" in capfd.readouterr().err
    assert kept_in(tmp_path / "run") == ["step-00000010"]
    assert not list((tmp_path / "run").glob(".*fetched*"))


def test_other_folders_in_the_store_are_left_alone(remote: Path, tmp_path: Path) -> None:
    there = filled(remote, tmp_path / "before" / "run", 10)
    with new_folder(there / "notes", kind="mine"):
        pass
    filled(remote, tmp_path / "before" / "run", 20, 30)
    assert kept_in(there) == ["step-00000020", "step-00000030"]
    assert (there / "notes" / MANIFEST).is_file()
    with Keeper(tmp_path / "run", SINGLE) as keeper:
        assert keeper.resume() is not None


def test_an_upload_that_was_cut_off_is_not_seen_and_done_again(
    remote: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "before" / "run"
    there = filled(remote, folder, 10, 20)
    storage = Storage(remote.as_uri())
    (there / "step-00000020" / MANIFEST).unlink()
    os.truncate(there / "step-00000020" / "tensors.safetensors", 50)
    assert storage.names("checkpoints/run") == ["step-00000010"]
    with Keeper(tmp_path / "run", SINGLE) as keeper:
        saved = keeper.resume()
    assert saved is not None and saved.state["progress"]["step"] == 10
    torn = there / "step-00000020" / MANIFEST
    for content in (None, b"{", b""):  # a mounted disk may keep part of a manifest
        if content is not None:
            torn.write_bytes(content)
        Mirror(folder, storage).upload()
        assert verify(there / "step-00000020") == verify(folder / "step-00000020")


UPLOADER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from pipeline.runtime.mirror import Storage
    storage, folder = Storage(sys.argv[1]), Path(sys.argv[2])
    print("begin", flush=True)
    storage.put(folder, sys.argv[3])
    print("end", flush=True)
    """
)


def test_whatever_a_killed_upload_left_is_whole_or_not_seen(remote: Path, tmp_path: Path) -> None:
    """kill -9 at random moments of uploads of 60 MB, until each kind of end was met."""
    folder = tmp_path / "run"
    tensors = {"vector": torch.arange(15_000_000.0)}
    save_checkpoint(folder, 10, tensors, {"progress": {"step": 10}})
    source, storage = folder / "step-00000010", Storage(remote.as_uri())
    rng, seen = random.Random(2), {"cut off": 0, "whole": 0}
    for place in range(60):
        under = f"checkpoints/{place}"
        target = remote / under / "step-00000010"
        with subprocess.Popen(
            [
                sys.executable,
                "-c",
                UPLOADER,
                remote.as_uri(),
                str(source),
                f"{under}/step-00000010",
            ],
            stdout=subprocess.PIPE,
            text=True,
        ) as uploader:
            assert uploader.stdout is not None
            uploader.stdout.readline()
            if place % 3:
                wait_until(target / "tensors.safetensors")
                time.sleep(rng.uniform(0, 0.02))
            else:
                uploader.stdout.readline()
            uploader.send_signal(signal.SIGKILL)
        if storage.names(under):
            assert verify(target) == verify(source)
            seen["whole"] += 1
        elif (target / "tensors.safetensors").exists():
            seen["cut off"] += 1
        if min(seen.values()) >= 3:
            break
        shutil.rmtree(remote / under)
    print(seen)
    assert min(seen.values()) >= 3, seen


def test_a_silent_store_is_an_error_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether it holds a newer checkpoint is not known; with a local one the run goes on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # closed again: nobody listens there
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    storage = Storage("s3://bucket/place")
    with pytest.raises(StorageError, match="bucket/place does not answer: .* It may hold"):
        Mirror(tmp_path / "none" / "run", storage).fetch_newer(0)
    save(tmp_path / "run", 10)
    Mirror(tmp_path / "run", storage).fetch_newer(newest_step(tmp_path / "run"))
    assert "going on from the local checkpoint of step 10" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize("address", ["gopher://x", "s3://", "s3:///", "file:///"])
def test_an_address_of_no_place_is_a_clear_error(address: str) -> None:
    with pytest.raises(ConfigError, match=f"METALOOM_STORAGE is '{address}'.*Set it to s3://"):
        Storage(address)


def test_the_checkpoints_of_a_finished_run_go_from_the_store_too(
    remote: Path, tmp_path: Path
) -> None:
    there = filled(remote, tmp_path / "run", 10, 20)
    assert sha256_file(there / "step-00000020" / MANIFEST)
    mirror.clear_everywhere(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert Storage(remote.as_uri()).names("checkpoints/run") == []
