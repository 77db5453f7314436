"""A checkpoint is whole or it is not used: mutations, kills, full disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import ArtefactError, TrainingError
from pipeline.core.files import new_folder, verify
from pipeline.runtime.checkpoint import load_checkpoint, save_checkpoint, tidy_checkpoints


def save(folder: Path, step: int) -> None:
    tensors = {"vector": torch.full((64,), float(step)), "first": torch.arange(8.0) * step}
    save_checkpoint(folder, step, tensors, {"step": step, "history": [step] * 4})


def test_the_newest_is_restored_exactly_and_two_are_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    for step in (10, 20, 30):
        save(tmp_path, step)
    saved = load_checkpoint(tmp_path)
    assert saved is not None
    assert saved.state == {"step": 30, "history": [30] * 4}
    assert torch.equal(saved.tensors["vector"], torch.full((64,), 30.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint in one of many ways; returns what was done."""
    path = rng.choice(sorted(p for p in folder.iterdir()))
    kind = rng.choice(
        ["flip", "flip", "flip", "truncate", "append", "delete", "swap", "extra", "link"]
    )
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncate":
        os.truncate(path, rng.randrange(len(content)))
    elif kind == "append":
        path.write_bytes(content + b"\0")
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = rng.choice(sorted(p for p in folder.iterdir() if p != path))
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
    elif kind == "extra":
        (folder / "more").write_bytes(b"x")
    else:
        path.unlink()
        path.symlink_to("/dev/null")
    return f"{kind} {path.name}"


def test_a_thousand_mutations_are_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "clean", 10)
    save(tmp_path / "clean", 20)
    rng = random.Random(0)
    refused = 0
    for i in range(1000):
        folder = tmp_path / f"{i}" / "clean"  # a run's folder keeps its name: checkpoints hold it
        shutil.copytree(tmp_path / "clean", folder)
        done = mutate(folder / "step-00000020", rng)
        with pytest.raises(ArtefactError):
            load_checkpoint(folder)
        tidy_checkpoints(folder)
        message = capfd.readouterr().err
        assert "checkpoint not used" in message, done
        assert "step-00000020" in message, done
        saved = load_checkpoint(folder)
        assert saved is not None
        assert saved.state["step"] == 10, done
        assert torch.equal(saved.tensors["vector"], torch.full((64,), 10.0))
        refused += 1
        shutil.rmtree(folder)
    print(f"mutated: 1000, refused by name with the one before used: {refused}")
    assert refused == 1000


def test_a_foreign_step_is_not_loaded_under_another_name(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000099")
    with pytest.raises(ArtefactError, match="holds step 10"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_run_is_set_aside_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Copied from another run's folder, whole and newer than all others: still not this run's."""
    save(tmp_path / "this", 10)
    save(tmp_path / "other", 20)
    shutil.copytree(tmp_path / "other" / "step-00000020", tmp_path / "this" / "step-00000020")
    with pytest.raises(ArtefactError, match="it is of another run, other"):
        load_checkpoint(tmp_path / "this")
    tidy_checkpoints(tmp_path / "this")
    assert "it is of another run, other" in capfd.readouterr().err
    saved = load_checkpoint(tmp_path / "this")
    assert saved is not None
    assert saved.state["step"] == 10
    assert len(list((tmp_path / "this").glob("damaged-*-step-00000020"))) == 1


@pytest.mark.parametrize("step", [None, "20", 2.5])
def test_a_manifest_without_a_step_is_refused(tmp_path: Path, step: object) -> None:
    folder = tmp_path / "step-00000020"
    with new_folder(folder, step=step, run=tmp_path.name):
        pass
    with pytest.raises(ArtefactError, match="not the one of its name"):
        load_checkpoint(tmp_path)


WRITER = textwrap.dedent(
    """
    import sys, torch
    from pathlib import Path
    from pipeline.runtime.checkpoint import save_checkpoint
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        tensors = {"vector": torch.full((200_000,), float(step))}
        save_checkpoint(folder, step, tensors, {"step": step})
        print(step, flush=True)
    """
)


def kill_writers(folder: Path, kills: int) -> list[int]:
    """Kill -9 a process that does nothing but save, again and again; returns progress at each."""
    rng, progress = random.Random(1), []
    step = 0
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            first = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            said = [first, *(int(line) for line in writer.stdout if line.endswith("\n"))]
        progress.append(len(said))
        for path in folder.glob("step-*"):
            verify(path)  # whatever is visible is whole
        tidy_checkpoints(folder)
        saved = load_checkpoint(folder)
        assert saved is not None
        assert saved.state["step"] >= said[-1]
        assert bool((saved.tensors["vector"] == saved.state["step"]).all())
        assert not list(folder.glob(".step-*"))
        step = saved.state["step"]
    return progress


@pytest.mark.parametrize("kills", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_only_whole_checkpoints(tmp_path: Path, kills: int) -> None:
    progress_at_kill = kill_writers(tmp_path, kills)
    print(f"kills: {kills}, checkpoints written before each: {progress_at_kill}")
    assert len(progress_at_kill) == kills
    assert min(progress_at_kill) >= 1, "a kill before any checkpoint proves nothing"


FULL_DISK = textwrap.dedent(
    """
    import json, resource, signal, sys, torch
    from pathlib import Path
    from pipeline.core.errors import TrainingError
    from pipeline.runtime.checkpoint import load_checkpoint, save_checkpoint
    folder = Path(sys.argv[1])
    save_checkpoint(folder, 1, {"vector": torch.ones(1000)}, {"step": 1})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 2, {"vector": torch.ones(1_000_000)}, {"step": 2})
    except TrainingError as error:
        print(json.dumps([str(error), load_checkpoint(folder).state["step"]]))
    """
)


@pytest.mark.parametrize("room", [0, 100, 100_000, 3_999_999])
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(
    tmp_path: Path, room: int
) -> None:
    """A file-size limit makes the kernel refuse the write in the middle, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c"), str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    message, step = json.loads(done.stdout)
    assert "cannot write the checkpoint" in message
    assert "resumes from the last good checkpoint" in message
    assert step == 1
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"]


def test_an_existing_step_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = (tmp_path / "step-00000010" / "manifest.json").stat().st_mtime_ns
    save_checkpoint(tmp_path, 10, {"vector": torch.zeros(1)}, {})
    assert (tmp_path / "step-00000010" / "manifest.json").stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the checkpoint"):
        save(tmp_path / "file", 1)
