"""A worker that stops while the others wait outside a collective is named; all start again (F8)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import TrainingError
from pipeline.core.files import verify
from pipeline.launch.base import Job, Launcher
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import newest_step
from pipeline.store.reader import Store
from tests.distributed.broken import Hang, Hungry, Slow
from tests.distributed.small_run import make_job

TIMEOUT_SECONDS = "3"
_CLUSTER, _SLOW = pytest.mark.cluster, pytest.mark.slow


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "how", "rank"),
    [
        ("local", "all", 1),
        pytest.param("local", "main", 0, marks=_SLOW),
        pytest.param("torchrun", "all", 1, marks=[_CLUSTER, _SLOW]),
        pytest.param("torchrun", "main", 0, marks=_CLUSTER),
        pytest.param("ray_train", "all", 1, marks=[_CLUSTER, _SLOW]),
        pytest.param("ray_train", "main", 0, marks=[_CLUSTER, _SLOW]),
    ],
)
def test_a_worker_that_never_comes_is_named_and_all_start_again(
    launcher: Launcher,
    how: str,
    rank: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("METALOOM_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    plan = Hang(rank=rank, how=how, done=tmp_path / "done")
    job = Job("tests.distributed.broken:hung", plan, 2, max_restarts=1)
    assert launcher(job, tmp_path / "launch") == [0, 1]
    assert plan.done.exists()
    logs = [log.read_text() for log in tmp_path.rglob("drive.log")]  # Ray's driver has its own
    told = " ".join([capfd.readouterr().err, *logs])
    assert f"worker {rank} does not answer" in told


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("what", "waits"),
    [
        pytest.param("checkpoints", True, marks=_SLOW),
        ("checkpoints", False),
        ("validation", True),
        pytest.param("validation", False, marks=_SLOW),
    ],
)
def test_long_work_of_one_worker_is_no_hang(
    what: str,
    waits: bool,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice as long as an exchange may take; without the waits it would be taken for one."""
    monkeypatch.setenv("METALOOM_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    job = make_job(tmp_path, blob_store, blob_tasks, num_steps=4, checkpoint_every=3)
    rank = 0 if what == "checkpoints" else 1
    plan = Slow(job=job, rank=rank, seconds=6.0, what=what, waits=waits)
    launched = Job("tests.distributed.broken:slowed", plan, 2)
    if waits:
        assert launch_local(launched, tmp_path / "launch")["steps"] == 4
    else:
        with pytest.raises(TrainingError, match=f"worker {rank} does not|no answer within"):
            launch_local(launched, tmp_path / "launch")


@pytest.mark.timeout(240)
def test_an_incident_is_kept_before_the_run_ends(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping it takes the main worker longer than an exchange may; the other one waits for it."""
    monkeypatch.setenv("METALOOM_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    job = make_job(
        tmp_path, blob_store, blob_tasks, spike_factor=1.01, max_gradient_norm=1e-3, on_spike="stop"
    )
    plan = Slow(job=job, rank=0, seconds=5.0, what="incident")
    with pytest.raises(TrainingError, match="metaloom replay ") as caught:
        launch_local(Job("tests.distributed.broken:slowed", plan, 2), tmp_path / "launch")
    kept = Path(str(caught.value).rpartition("metaloom replay ")[2])
    assert verify(kept)["kind"] == "incident"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_worker_alone_cannot_mend_ends_the_run_by_its_own_words(
    rank: int, blob_store: Store, blob_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits for it in an exchange, and has nothing to say."""
    monkeypatch.setenv("METALOOM_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    plan = Hungry(job=make_job(tmp_path, blob_store, blob_tasks), rank=rank)
    launched = Job("tests.distributed.broken:hungry", plan, 2, max_restarts=0)
    with pytest.raises(TrainingError, match="out of memory with 1 task.*To mend it, "):
        launch_local(launched, tmp_path / "launch")


@pytest.mark.timeout(240)
def test_the_last_checkpoint_is_uploaded_before_a_guard_ends_the_run(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main worker's upload takes two seconds; the other one raises the same error meanwhile."""
    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "store").as_uri())
    job = make_job(
        tmp_path, blob_store, blob_tasks, spike_factor=1.01, max_gradient_norm=1e-3, on_spike="stop"
    )
    plan = Slow(job=job, rank=0, seconds=2.0, what="uploads")
    with pytest.raises(TrainingError, match="metaloom replay "):
        launch_local(Job("tests.distributed.broken:slowed", plan, 2), tmp_path / "launch")
    kept = newest_step(job.checkpoints)
    stored = tmp_path / "store" / "checkpoints" / job.checkpoints.name
    assert kept and newest_step(stored) == kept
