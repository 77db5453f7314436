"""Guards switched off: what each of them keeps away comes about, so their tests can fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.core.errors import DataError, StoppedError
from pipeline.launch.attempts import Attempts
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training import loop
from tests.chaos.disturbed import Disturbed, long_job
from tests.distributed.broken import Bug, Deaf, Strange
from tests.distributed.small_run import make_job
from tests.unit import test_stops

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def test_without_the_bound_a_mistake_is_met_again_and_again(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times from one checkpoint, though one new start was allowed; here it goes away then."""
    monkeypatch.setattr(Attempts, "check", lambda self, most, cause: None)
    job = make_job(tmp_path, blob_store, blob_tasks, num_steps=6)
    plan = Bug(job=job, starts=tmp_path / "starts", times={3: 3})
    launch_local(Job("tests.distributed.broken:buggy", plan, 1, max_restarts=1), tmp_path / "l")
    assert plan.starts.read_text().split() == ["3"] * 3


@pytest.mark.parametrize("guarded", [True, False])
def test_one_worker_is_asked_to_stop(
    guarded: bool, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """All stop behind the same step; if each decides for itself, one waits for what never comes."""
    plan = Deaf(job=long_job(tmp_path / "run", blob_store, blob_tasks), guarded=guarded)
    environment, entry = {"METALOOM_TIMEOUT_SECONDS": "3"}, "tests.distributed.broken:deaf"
    run = Disturbed(plan.job, "local", environment=environment, entry=entry, plan=plan)
    run.start(2)
    try:
        assert run.wait_for_steps(5)
        os.kill(run.workers()[1], signal.SIGTERM)
        while not run.restarts_told():
            assert run.is_running(), run.log()
            time.sleep(0.02)
        before, (why,) = run.steps(), run.restarts_told()
        lost, _ = run.wait_until_it_goes_on(before)
    finally:
        run.kill(run.tree())
    as_agreed = "a worker was asked to stop, and this process was not"
    assert (as_agreed in why) == guarded
    assert (lost == 0) == guarded


@pytest.mark.parametrize("guarded", [True, False])
def test_one_worker_holds_other_data(
    guarded: bool, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """It is refused by name; or else the run ends well, with weights of both."""
    job = make_job(tmp_path / "run", blob_store, blob_tasks, num_steps=6)
    plan = Strange(job=job, store=tmp_path / "other", guarded=guarded)
    launched = Job("tests.distributed.broken:strange", plan, 2)
    if guarded:
        with pytest.raises(DataError, match="store of worker 1 is not what worker 0 has"):
            launch_local(launched, tmp_path / "launch")
    else:
        assert launch_local(launched, tmp_path / "launch")["steps"] == 6


@pytest.mark.parametrize("guarded", [True, False])
def test_points_that_were_on_their_way_when_the_workers_ended(
    guarded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the checkpoint and told again; or else they are missing for ever."""
    with pytest.raises(StoppedError):
        test_stops.train(tmp_path, test_stops.asked_at(5 * 10))
    (tmp_path / "journal.jsonl").unlink()
    if not guarded:
        monkeypatch.setattr(loop, "_tell_again", lambda saved, log, context: None)
    test_stops.train(tmp_path, SINGLE)
    steps = {point.step for point, _ in read_points(tmp_path / "journal.jsonl")}
    assert steps == set(range(9 if guarded else 12, 31)), sorted(steps)
