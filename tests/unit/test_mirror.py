"""Copies of checkpoints in a store: whole or not seen, and never in the way of training."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import ArtefactError, ConfigError, StorageError, TrainingError
from pipeline.core.files import MANIFEST, new_folder, sha256_file, verify
from pipeline.runtime import mirror
from pipeline.runtime.checkpoint import (
    load_checkpoint,
    newest_step,
    save_checkpoint,
    tidy_checkpoints,
)
from pipeline.runtime.context import SINGLE
from pipeline.runtime.mirror import Mirror
from pipeline.runtime.resume import Keeper
from pipeline.runtime.storage import Storage
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


def test_an_error_without_words_is_no_end_of_the_uploads(
    remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a store's client raises, and however little it says."""
    folder, storage, tries = tmp_path / "run", Storage(remote.as_uri()), itertools.count()
    put = storage.put

    def refuse_once(*arguments: Any) -> None:
        if not next(tries):
            raise MemoryError
        put(*arguments)

    storage.put = refuse_once  # type: ignore[method-assign]
    save(folder, 5)
    uploads = Mirror(folder, storage)
    uploads.start()
    wait_until(remote / "checkpoints" / "run" / "step-00000005" / MANIFEST)
    uploads.close()
    assert "takes no checkpoint (MemoryError)" in capsys.readouterr().err


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
    from pipeline.runtime.storage import Storage
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


class Interrupted:
    """A store's real file system; something else happens whenever it is to take one more file."""

    def __init__(self, filesystem: Any, happens: Callable[[], None]) -> None:
        self.filesystem, self.happens = filesystem, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.filesystem, name)

    def open_output_stream(self, path: str) -> Any:
        self.happens()
        return self.filesystem.open_output_stream(path)


def test_a_store_slower_than_the_checkpoints_gets_newer_ones_all_the_same(
    remote: Path, tmp_path: Path
) -> None:
    """Each of a checkpoint's three files takes it as long as the trainer takes for three more."""
    folder, steps = tmp_path / "run", itertools.count(1)

    def train_on() -> None:
        for _ in range(3):
            save(folder, next(steps))
        tidy_checkpoints(folder)  # as another start of the run does

    train_on()
    storage = Storage(remote.as_uri())
    storage.filesystem = Interrupted(storage.filesystem, train_on)
    uploader = Mirror(folder, storage)
    for upload in range(4):
        newest = newest_step(folder)
        assert uploader.upload() == newest == 3 + 9 * upload
        assert len(kept_in(folder)) == 2 and newest_step(folder) == newest + 9
        there = remote / "checkpoints" / "run" / f"step-{newest:08d}"
        assert verify(there)["step"] == newest
    assert len(kept_in(there.parent)) == 2
    assert sorted(p.name for p in folder.iterdir()) == kept_in(folder), "nothing hidden is left"


def test_the_mirror_keeps_up_beside_a_trainer_that_never_waits(
    remote: Path, tmp_path: Path
) -> None:
    folder, trained = tmp_path / "run", threading.Event()

    def wait_for_three() -> None:
        third = newest_step(folder) + 3
        while newest_step(folder) < third and not trained.is_set():
            time.sleep(0.001)

    storage, seen = Storage(remote.as_uri()), set()
    storage.filesystem = Interrupted(storage.filesystem, wait_for_three)
    uploader = Mirror(folder, storage)
    uploader.start()
    for step in range(1, 501):
        save(folder, step)
        seen.update(Storage(remote.as_uri()).names("checkpoints/run"))
        if len(seen) >= 3:
            break
    trained.set()
    uploader.close()
    assert len(seen) >= 3, f"of {step} checkpoints {seen} arrived"
    assert kept_in(remote / "checkpoints" / "run")[-1] == kept_in(folder)[-1]


def test_a_checkpoint_that_goes_away_under_the_uploader_is_replaced_by_the_newer_at_once(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link, links = tmp_path / "run", os.link, itertools.count()

    def late(source: Path, target: Path) -> None:
        if next(links) == 1:  # one file of three is safe
            save(folder, 20)
            save(folder, 30)
        link(source, target)

    save(folder, 10)
    monkeypatch.setattr(mirror.os, "link", late)
    assert Mirror(folder, Storage(remote.as_uri())).upload() == 30
    assert next(links) == 5
    assert kept_in(remote / "checkpoints" / "run") == ["step-00000030"]
    assert sorted(p.name for p in folder.iterdir()) == kept_in(folder)


HANGING = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from pipeline.runtime.mirror import Mirror
    from pipeline.runtime.storage import Storage
    from tests.unit.test_mirror import Interrupted

    def hang():
        print("begin", flush=True)
        time.sleep(600)

    storage = Storage(sys.argv[1])
    storage.filesystem = Interrupted(storage.filesystem, hang)
    Mirror(Path(sys.argv[2]), storage).upload()
    """
)


def test_what_a_killed_uploader_left_is_not_a_checkpoint_and_goes_at_the_next_start(
    remote: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    save(folder, 10)
    command = [sys.executable, "-c", HANGING, remote.as_uri(), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as uploader:
        assert uploader.stdout is not None and uploader.stdout.readline() == "begin\n"
        uploader.send_signal(signal.SIGKILL)
    (left,) = folder.glob(".*")
    assert verify(left)["step"] == 10
    tidy_checkpoints(folder)
    assert left.exists() and newest_step(folder) == 10
    with Keeper(folder, SINGLE) as keeper:
        assert keeper.resume() is not None
        assert not left.exists()
    assert kept_in(remote / "checkpoints" / "run") == ["step-00000010"]


def tear(there: Path, *steps: int) -> None:
    """What uploads leave that were cut off before the manifest."""
    for step in steps:
        (there / f"step-{step:08d}").mkdir()
        (there / f"step-{step:08d}" / "tensors.safetensors").write_bytes(b"half")


def test_torn_copies_go_with_the_old_ones_unless_they_are_newer(
    remote: Path, tmp_path: Path
) -> None:
    """A newer one may be what another machine is uploading at this moment."""
    there = filled(remote, tmp_path / "run", 10, 30)
    tear(there, 5, 20, 35, 45)
    filled(remote, tmp_path / "run", 40)
    assert kept_in(there) == ["step-00000030", "step-00000040", "step-00000045"]


def test_nothing_of_a_finished_run_stays_in_the_store(remote: Path, tmp_path: Path) -> None:
    there = filled(remote, tmp_path / "run", 10, 20)
    other = filled(remote, tmp_path / "run-2", 10)
    tear(there, 15, 30)
    mirror.clear_stored(tmp_path / "run")
    assert not there.exists()
    assert kept_in(other) == ["step-00000010"]
    mirror.clear_stored(tmp_path / "run")


def test_a_run_without_a_checkpoint_misses_none(
    remote: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Keeper(tmp_path / "run", SINGLE) as keeper:
        keeper.resume()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("local", [0, 10])
def test_a_store_that_falls_silent_in_the_middle_is_not_taken_for_the_disk(
    local: int, remote: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The memory of a process can be opened as a file, but its first bytes cannot be read."""
    victim = filled(remote, tmp_path / "before" / "run", 20) / "step-00000020/tensors.safetensors"
    victim.unlink()
    victim.symlink_to("/proc/self/mem")
    uploader = Mirror(tmp_path / "run", Storage(remote.as_uri()))
    if local:
        save(tmp_path / "run", local)
        uploader.fetch_newer(local)
        assert "does not answer" in capfd.readouterr().err
    else:
        with pytest.raises(StorageError, match="does not answer"):
            uploader.fetch_newer(0)
    assert not list((tmp_path / "run").glob(".*"))


ON_A_DISK_OF_ITS_OWN = """
import os, shutil, subprocess, sys
from pathlib import Path
from pipeline.core.errors import StorageError
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.mirror import Mirror
from pipeline.runtime.storage import Storage
from tests.unit.test_mirror import Interrupted, save

storage, folder = Storage(sys.argv[1]), Path(sys.argv[2])
"""

FETCH = """
options, local = sys.argv[3], int(sys.argv[4])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder.parent], check=True)
folder.mkdir()
if local:
    save(folder, local)
subprocess.run(["mount", "-o", "remount," + options, folder.parent], check=True)
try:
    Mirror(folder, storage).fetch_newer(newest_step(folder))
except StorageError as error:
    print(error)
print([p.name for p in folder.iterdir() if p.name.startswith(".")], newest_step(folder))
"""

UPLOAD = """
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder.parent], check=True)
save(folder, 10)
subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
Mirror(folder, storage).upload()
"""

# A folder that is mounted onto itself: no link leads out of a mount.
UPLOAD_WITHOUT_LINKS = """
save(folder, 10)
source = folder / "step-00000010"
subprocess.run(["mount", "--bind", source, source], check=True)
try:
    os.link(source / "state.json", folder / "linked")
except OSError as error:
    print(error)

def tidy():
    if source.exists():
        subprocess.run(["umount", source], check=True)
        shutil.rmtree(source)

storage.filesystem = Interrupted(storage.filesystem, tidy)
Mirror(folder, storage).upload()
print(source.exists())
"""


def on_a_disk_of_its_own(program: str, *arguments: object) -> str:
    """Run it as root of a namespace of its own, whose mounts nobody else sees."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no `unshare`, so no disk of its own can be mounted here")
    tried = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {tried.stderr.strip()}")
    source = ON_A_DISK_OF_ITS_OWN + program
    command = ["unshare", "-Urm", sys.executable, "-c", source, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("local", [0, 10])
@pytest.mark.parametrize(("options", "why"), [("size=64k", "No space"), ("ro", "Read-only")])
def test_a_disk_that_cannot_hold_the_stores_checkpoint_is_not_the_stores_fault(
    options: str, why: str, local: int, remote: Path, tmp_path: Path
) -> None:
    """The run neither begins anew nor goes on from an older checkpoint of its own."""
    (tmp_path / "disk").mkdir()
    before = tmp_path / "before" / "run"
    save_checkpoint(before, 20, {"vector": torch.zeros(100_000)}, {"progress": {"step": 20}})
    Mirror(before, Storage(remote.as_uri())).upload()
    folder = tmp_path / "disk" / "run"
    said = on_a_disk_of_its_own(FETCH, remote.as_uri(), folder, options, local)
    assert f"cannot write {folder}/step-00000020" in said and why in said
    assert "Free some space" in said and "does not answer" not in said
    assert said.endswith(f"\n[] {local}\n")


def test_a_disk_that_has_become_read_only_is_uploaded_from_where_it_is(
    remote: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    on_a_disk_of_its_own(UPLOAD, remote.as_uri(), tmp_path / "disk" / "run")
    assert verify(remote / "checkpoints" / "run" / "step-00000010")["step"] == 10


def test_where_the_disk_has_no_links_the_uploader_keeps_a_copy(
    remote: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    said = on_a_disk_of_its_own(UPLOAD_WITHOUT_LINKS, remote.as_uri(), folder)
    assert "Invalid cross-device link" in said and said.endswith("False\n")
    assert verify(remote / "checkpoints" / "run" / "step-00000010")["step"] == 10
    assert not list(folder.iterdir())


def test_the_checkpoints_of_a_finished_run_go_from_the_store(remote: Path, tmp_path: Path) -> None:
    there = filled(remote, tmp_path / "run", 10, 20)
    assert sha256_file(there / "step-00000020" / MANIFEST)
    mirror.clear_stored(tmp_path / "run")
    assert Storage(remote.as_uri()).names("checkpoints/run") == []


def test_a_name_that_leads_out_of_the_folder_is_refused(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store takes any name; no disk can hold this one, so the listing is made up."""
    storage, target = Storage(remote.as_uri()), tmp_path / "here" / "fetched"
    monkeypatch.setattr(Storage, "_files", lambda self, base: [f"{base}/../../stray"])
    monkeypatch.setattr(Storage, "_pieces", lambda self, found: [b"stray"])
    with pytest.raises(ArtefactError, match="would lie outside its folder"):
        storage.get("one", target)
    assert not list(tmp_path.rglob("stray*")) and not target.exists()
