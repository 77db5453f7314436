"""A slow worker or a slow disk: tasks/s falls, nothing is lost, the log says who it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.chaos.campaign import Campaign, Try
from tests.chaos.disturbed import told_of
from tests.distributed.broken import Slow
from tests.distributed.small_run import CHECKPOINT_EVERY, digest, make_job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

_STEPS, _DELAY = 24, 0.15


def rate(job: MetaTrainJob) -> float:
    points = [point.metrics for point, _ in read_points(job.journal)]
    return statistics.median(p["tasks_per_second"] for p in points if "tasks_per_second" in p)


Pair = Callable[..., tuple[bool, list[dict[str, Any]], dict[str, MetaTrainJob]]]


@pytest.fixture
def slowed(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Pair:
    """Run a quick job and the slow one: are their bits equal, what was told of the slow one."""

    def run(event: str, **plan: Any) -> tuple[bool, list[dict[str, Any]], dict[str, MetaTrainJob]]:
        jobs = {
            name: make_job(tmp_path / name, blob_store, blob_tasks, num_steps=_STEPS)
            for name in ("quick", "slow")
        }
        quick = Job("pipeline.training.meta_train:run", jobs["quick"], 2)
        metrics = launch_local(quick, tmp_path / "launch-quick")
        before = told_of(event, capfd.readouterr().err)
        assert event == "straggler" or not before, "a quick disk is not told of"
        slow = Job("tests.distributed.broken:slowed", Slow(job=jobs["slow"], **plan), 2)
        result = launch_local(slow, tmp_path / "launch-slow")
        told = told_of(event, capfd.readouterr().err)
        return result == metrics and digest(jobs["slow"]) == digest(jobs["quick"]), told, jobs

    return run


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("compute", "computes"),
        pytest.param("data", "waits for its data", marks=pytest.mark.slow),
    ],
)
def test_the_log_says_who_is_slow_and_the_bits_stay(
    what: str, why: str, slowed: Pair, campaign: Callable[[str], Campaign]
) -> None:
    equal, told, jobs = slowed("straggler", rank=1, seconds=_DELAY, what=what)
    rates = {name: rate(job) for name, job in jobs.items()}
    named = bool(told) and all(s["worker"] == 1 and s["why"].startswith(why) for s in told)
    record = campaign(f"one worker slow: {what}")
    record.notes |= {"tasks_per_second": {n: round(r, 1) for n, r in rates.items()}}
    record.add(Try(_STEPS, named and rates["slow"] < rates["quick"], equal, 0))


@pytest.mark.slow
def test_the_log_says_that_the_disk_is_slow_and_the_bits_stay(
    slowed: Pair, campaign: Callable[[str], Campaign]
) -> None:
    equal, told, jobs = slowed("slow disk", rank=0, seconds=1.1, what="checkpoints")
    writes = -(-_STEPS // CHECKPOINT_EVERY)
    named = all(line["folder"] == str(jobs["slow"].checkpoints) for line in told)
    slower = rate(jobs["slow"]) < rate(jobs["quick"])
    campaign("a slow disk").add(Try(_STEPS, len(told) == writes and named and slower, equal, 0))
