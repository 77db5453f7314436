"""A wish to stop that comes while the workers are still starting."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from pipeline.core.errors import StoppedError
from pipeline.launch.base import Job
from pipeline.runtime.checkpoint import newest_step
from pipeline.store.reader import Store
from tests.contract.drive import drive, outcome, start
from tests.distributed.slow_to_import import BEGUN
from tests.distributed.small_run import CHECKPOINT_EVERY, digest, make_job


@pytest.mark.parametrize("name", ["local", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_wish_to_stop_during_the_start_is_granted_and_lost_on_nobody(
    name: str, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """It ends as any stop does, and the same command ends with the bits of a run without one."""
    job = make_job(tmp_path / "stopped", blob_store, blob_tasks, num_steps=30)
    entry = Job("tests.distributed.slow_to_import:run", job, 1)
    begun = tmp_path / "begun"
    driver = start(name, entry, tmp_path / "first", {BEGUN: str(begun)})
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert begun.exists(), (tmp_path / "first" / "drive.log").read_text()
    driver.send_signal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"^stopped (before|behind).*as asked"):
        outcome(driver, tmp_path / "first")
    assert newest_step(job.checkpoints) <= CHECKPOINT_EVERY
    drive(name, entry, tmp_path / "second")
    plain = make_job(tmp_path / "plain", blob_store, blob_tasks, num_steps=30)
    drive(name, Job("pipeline.training.meta_train:run", plain, 1), tmp_path / "third")
    assert digest(job) == digest(plain)
