"""Disks that are full or read-only: the last good state stays, and the end is a clear one (F6)."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.files import read_json, verify
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store, open_store
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.meta_train import run as train
from tests.chaos import small_disk
from tests.chaos.campaign import Campaign, Try, tries
from tests.distributed.small_run import CHECKPOINT_EVERY, NUM_STEPS, digest, make_job
from tests.unit.test_store_integrity import small_store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def _can_mount() -> None:
    if reason := small_disk.why_not():
        pytest.skip(f"no disk of its own can be mounted here: {reason}")


@pytest.fixture
def undisturbed(tmp_path: Path, blob_store: Store, blob_tasks: Path) -> MetaTrainJob:
    job = make_job(tmp_path / "undisturbed", blob_store, blob_tasks)
    train(job, SINGLE)
    return job


def run(*arguments: object) -> None:
    done = subprocess.run(small_disk.command(*arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fills_while_training(
    undisturbed: MetaTrainJob,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    campaign: Callable[[str], Campaign],
) -> None:
    """Training ends with the status of a refusing disk; with room again, with the same bits."""
    record, rng = campaign("the disk fills while training"), random.Random(4)
    for number in range(tries(1, 20)):
        folder = tmp_path / f"run-{number}"
        job = make_job(folder, blob_store, blob_tasks)
        (folder / "job.json").write_text(job.model_dump_json())
        at_step, left = rng.randrange(CHECKPOINT_EVERY + 1, NUM_STEPS - 10), rng.randrange(60_000)
        run("filling", folder / "job.json", at_step, left, folder / "found.json")
        found = read_json(folder / "found.json")
        told = "cannot write the checkpoint" in found["said"] and "Free some space" in found["said"]
        clean = found["status"] == StorageError.status != 1 and not found["hidden"]
        whole = found["checkpoint"] is not None and found["checkpoint"] >= CHECKPOINT_EVERY
        ended = found["second_status"] == 0 and digest(job) == digest(undisturbed)
        lost = found["reached"] - (found["checkpoint"] or 0)
        record.add(Try(found["reached"], told and clean and whole, ended, lost))
        assert "Traceback" not in found["said"]
    assert max(t.steps_lost or 0 for t in record.tries) <= CHECKPOINT_EVERY


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_launcher_too(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, campaign: Callable[[str], Campaign]
) -> None:
    """Not even the workers' last words can be left; still the right status, and no traceback."""
    record = campaign("the disk of everything fills while training")
    undisturbed = make_job(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=400)
    train(undisturbed, SINGLE)
    for number in range(tries(1, 5)):
        found_file = tmp_path / f"found-{number}.json"
        run("all-full", tmp_path / f"disk-{number}", blob_store.folder, blob_tasks, found_file)
        found = read_json(found_file)
        told = "cannot write" in found["said"] and "Free some space" in found["said"]
        clean = found["status"] == StorageError.status and "Traceback" not in found["said"]
        whole = found["checkpoint"] is not None and found["checkpoint"] >= CHECKPOINT_EVERY
        same = found["second_status"] == 0 and found["digest"] == list(digest(undisturbed))
        lost = found["reached"] - (found["checkpoint"] or 0)
        record.add(Try(found["reached"], told and clean and whole, same, lost))
        assert told and clean, found["said"]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(
    undisturbed: MetaTrainJob, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", blob_store, blob_tasks)
    job_file, result = tmp_path / "run" / "job.json", tmp_path / "found.json"
    job_file.write_text(job.model_dump_json())
    run("read-only", job_file, tmp_path / "stores", result)
    found = read_json(result)
    assert found["before"] == found["after"] == NUM_STEPS // 2, "the last checkpoint stays"
    assert found["status"] == StorageError.status
    assert "Read-only" in found["said"] and "Traceback" not in found["said"]
    assert "cannot write the store" in found["store_error"] and "mend" in found["store_error"]
    assert found["store_rows"] == 60


@pytest.mark.slow
def test_a_store_that_does_not_fit_leaves_the_old_one(
    tmp_path: Path, campaign: Callable[[str], Campaign]
) -> None:
    """ENOSPC at every stage of the writing; a try's progress is the room that was used up."""
    record, rng = campaign("the disk fills while a store is written"), random.Random(5)
    rooms = [rng.randrange(150, 2300) << 10 for _ in range(tries(20, 60))]
    run("store", tmp_path / "disk", json.dumps(rooms), tmp_path / "found.json")
    for one in read_json(tmp_path / "found.json"):
        told = "cannot write the store" in one["error"] and "Free some space" in one["error"]
        record.add(Try(one["room"], told and one["same"] and one["left"] == ["store"]))


@pytest.mark.parametrize("room", [0, 100, 5_000, 40_000, 81_000])
def test_a_limit_on_the_size_of_files_is_an_error_too(tmp_path: Path, room: int) -> None:
    """EFBIG, in the middle of a write."""
    small_store(tmp_path / "store")
    before = verify(tmp_path / "store")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write the store .*Free some space"):
            small_store(tmp_path / "store", level=1, size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert verify(tmp_path / "store") == before
    assert open_store(tmp_path / "store").num_rows == 60
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
