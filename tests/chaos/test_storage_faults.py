"""The object store goes away while a run mirrors its checkpoints into it, or another goes on there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.servers import Server
from pipeline.core.errors import StorageError
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.mirror import clear_stored
from pipeline.runtime.storage import Storage
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, tries
from tests.chaos.disturbed import CHECKPOINT_EVERY, NUM_STEPS, Disturbed, long_job, undisturbed
from tests.contract.drive import REPOSITORY
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture
def place(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of its own in the store, with the way to it in the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"{s3.environment['METALOOM_S3']}/{tmp_path.name}"
    monkeypatch.setenv("METALOOM_STORAGE", uri)
    return uri


def test_another_machine_goes_on_from_the_store(
    campaign: Callable[[str], Campaign],
    place: str,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """The machine is gone with its disk; the store has the newest checkpoint but one."""
    found = campaign("a machine lost with its disk, checkpoints on S3")
    length = 3 * NUM_STEPS
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=length)
    clear_stored(tmp_path / "undisturbed" / "checkpoints")  # the same name in the store
    first = long_job(tmp_path / "first" / "run", blob_store, blob_tasks, num_steps=length)
    run = Disturbed(first, "local")
    run.start(2)
    storage = Storage(place)
    under = f"checkpoints/{first.checkpoints.name}"
    while not storage.names(under) or not run.wait_for_steps(3 * CHECKPOINT_EVERY):
        assert run.is_running(), run.log()
    begin = time.monotonic()
    run.kill(run.tree())
    reached = max(run.steps())
    mirrored = int(storage.names(under)[-1].removeprefix("step-"))
    second = long_job(tmp_path / "second" / "run", blob_store, blob_tasks, num_steps=length)
    again = Disturbed(second, "local")
    again.start(3)
    assert again.wait_for_steps(1)
    seconds = time.monotonic() - begin
    assert again.steps()[0] == mirrored + 1
    equal = again.end() == metrics and digest(second) == bits
    found.add(Try(reached, True, equal, steps_lost=reached - mirrored, seconds=seconds))
    clear_stored(second.checkpoints)
    assert not storage.names(under)


@pytest.mark.slow
def test_the_store_is_gone_for_a_while(
    campaign: Callable[[str], Campaign],
    s3: Server,
    place: str,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Training goes on, and in the end the store has the last checkpoint."""
    found = campaign("S3 gone for a while")
    seconds = tries(ci=10, full=120)
    steps = NUM_STEPS if seconds < 60 else 60 * NUM_STEPS
    # Long enough for the outage: a run that learns nothing more must not end before it does.
    length = {"num_steps": steps, "patience": steps}
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, **length)
    job = long_job(tmp_path / "run", blob_store, blob_tasks, **length)
    # By a name of its own: what the undisturbed run has left in the store is not to be taken up.
    job = job.model_copy(update={"checkpoints": tmp_path / "run" / "of-its-own"})
    run = Disturbed(job, "local")
    run.start(2)
    assert run.wait_for_steps(CHECKPOINT_EVERY + 1)
    before = len(run.steps())
    s3.stop()
    try:
        went_on = run.wait_for_steps(before + 3 * CHECKPOINT_EVERY)
        time.sleep(seconds)
        assert run.is_running(), "the run has ended in the outage"
    finally:
        s3.start()
    equal = run.end() == metrics and digest(job) == bits
    names = Storage(place).names(f"checkpoints/{job.checkpoints.name}")
    assert names[-1] == f"step-{steps:08d}", (names, run.log())
    found.add(Try(before, went_on, equal, steps_lost=0))
    found.notes["seconds_gone"] = seconds


def upload(folder: Path) -> subprocess.CompletedProcess[str]:
    """`metaloom upload` in the folder of the runs."""
    command = [sys.executable, "-m", "pipeline.cli", "upload"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_store_is_gone_for_good(
    campaign: Callable[[str], Campaign],
    s3: Server,
    place: str,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """The run ends well and says what is kept where; `metaloom upload` brings it when it is back."""
    found = campaign("S3 gone for good")
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    kept = tmp_path / ".metaloom" / "checkpoints" / "run"
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    job = job.model_copy(update={"checkpoints": kept})
    run = Disturbed(job, "local")
    run.start(2)
    assert run.wait_for_steps(CHECKPOINT_EVERY + 1)
    before = len(run.steps())
    s3.stop()
    try:
        equal = run.end() == metrics and digest(job) == bits
        assert "takes no checkpoint" in run.log() and "metaloom upload" in run.log()
        refused = upload(tmp_path)
        assert refused.returncode == StorageError.status
        assert "still in .metaloom/checkpoints" in refused.stderr
    finally:
        s3.start()
    last = newest_step(kept)
    done = upload(tmp_path)
    assert done.returncode == 0, done.stderr
    assert Storage(place).names(f"checkpoints/{job.checkpoints.name}")[-1] == f"step-{last:08d}"
    outcome = Try(before, survived=True, bits_equal=equal, steps_lost=0)
    found.add(dataclasses.replace(outcome, survived=last == NUM_STEPS))


def test_a_new_machine_does_not_begin_anew_while_the_store_is_silent(
    s3: Server, place: str, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    run = Disturbed(job, "local")
    s3.stop()
    try:
        run.start(2)
        with pytest.raises(
            StorageError, match="may hold a newer checkpoint.*unset METALOOM_STORAGE"
        ):
            run.end()
    finally:
        s3.start()
