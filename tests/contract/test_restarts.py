"""Bounded restarts: a mistake that stays ends the run, one that goes away does not (F10)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.errors import TrainingError
from pipeline.launch.base import Job, Launcher
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import newest_step
from pipeline.store.reader import Store
from tests.distributed.broken import Bug
from tests.distributed.small_run import digest, make_job

BUGGY = "tests.distributed.broken:buggy"
on_clusters = pytest.param("torchrun", marks=pytest.mark.cluster)
by_night = pytest.param("ray_train", marks=[pytest.mark.cluster, pytest.mark.slow])
every_launcher = pytest.mark.parametrize("name", ["local", on_clusters, by_night])


def a_plan(folder: Path, store: Store, tasks: Path, times: dict[int, int | None]) -> Bug:
    job = make_job(folder, store, tasks, num_steps=30, validate_every=15)
    return Bug(job=job, starts=folder / "starts", times=times)


@every_launcher
@pytest.mark.parametrize(
    ("step", "max_restarts", "starts", "tried"),
    [(12, 0, 1, r"checkpoint\.$"), (3, 1, 2, r"\(2 starts from step 0\)")],
)
def test_a_mistake_that_stays_ends_the_run_by_name(
    launcher: Launcher,
    step: int,
    max_restarts: int,
    starts: int,
    tried: str,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    plan = a_plan(tmp_path, blob_store, blob_tasks, {step: None})
    expected = f"worker 0 .*ZeroDivisionError: a mistake at step {step}.*{tried}"
    with pytest.raises(TrainingError, match=expected):
        launcher(Job(BUGGY, plan, 1, max_restarts=max_restarts), tmp_path / "launch")
    assert plan.starts.read_text().split() == [str(step)] * starts
    assert newest_step(plan.job.checkpoints) == step // 5 * 5


@every_launcher
def test_workers_that_cannot_begin_end_the_run_too(
    launcher: Launcher, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, blob_store, blob_tasks)
    missing = Job("tests.distributed.no_such_module:run", job, 2, max_restarts=1)
    with pytest.raises(TrainingError, match="No module named.*no_such_module"):
        launcher(missing, tmp_path / "launch")


def test_mistakes_that_go_away_are_survived_and_progress_begins_the_count_anew(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """Two failures with at most one restart in a row from one checkpoint: the bits of none."""
    plan = a_plan(tmp_path / "a", blob_store, blob_tasks, {3: 1, 12: 1})
    launch_local(Job(BUGGY, plan, 1, max_restarts=1), tmp_path / "launch-a")
    assert Counter(plan.starts.read_text().split()) == {"3": 1, "12": 1}
    undisturbed = a_plan(tmp_path / "b", blob_store, blob_tasks, {})
    launch_local(Job(BUGGY, undisturbed, 1), tmp_path / "launch-b")
    assert digest(plan.job) == digest(undisturbed.job)
