"""Silent divergence: one bit flips in one worker's memory, and no checkpoint ever holds it (F12)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import read_json
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.chaos.campaign import Campaign, Try, tries
from tests.chaos.disturbed import told_of
from tests.distributed.broken import Flip
from tests.distributed.small_run import digest, make_job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

NUM_STEPS, CHECKPOINT_EVERY = 30, 5


def small(folder: Path, store: Store, tasks: Path) -> MetaTrainJob:
    return make_job(folder, store, tasks, num_steps=NUM_STEPS, validate_every=15)


def run_flipped(plan: Flip, workers: int) -> dict[str, Any]:
    job = Job("tests.distributed.broken:flipped", plan, workers, max_restarts=3)
    result: dict[str, Any] = launch_local(job, plan.done.parent / "launch")
    return result


def test_a_flipped_bit_is_caught_at_the_next_checkpoint(
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    campaign: Callable[[str], Campaign],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Anywhere in the parameters; with three workers it is known who errs, with two that one does."""
    undisturbed = small(tmp_path / "undisturbed", blob_store, blob_tasks)
    metrics = launch_local(Job("pipeline.training.meta_train:run", undisturbed, 2), tmp_path / "l")
    record = campaign("one bit flips in one worker's parameters")
    rng, seen = random.Random(5), []
    for place in range(tries(ci=1, full=20)):
        workers = 2 + place % 2
        plan = Flip(
            job=small(tmp_path / f"run-{place}", blob_store, blob_tasks),
            rank=rng.randrange(workers),
            step=rng.randrange(1, NUM_STEPS),
            place=rng.random(),
            bit=rng.randrange(32),
            done=tmp_path / f"run-{place}" / "done",
        )
        capfd.readouterr()
        result = run_flipped(plan, workers)
        assert plan.done.exists(), "no bit was flipped"
        told = told_of("restart", capfd.readouterr().err)
        before = plan.step // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        if plan.step % CHECKPOINT_EVERY == 0:
            before -= CHECKPOINT_EVERY
        caught = len(told) == 1 and "held other parameters than the rest" in told[0]["why"]
        at = int(re.findall(r"at step (\d+)", told[0]["why"])[0]) if caught else -1
        within = plan.step <= at <= before + CHECKPOINT_EVERY
        named = workers == 2 or f": worker {plan.rank} of 3 held" in told[0]["why"]
        equal = result == metrics and digest(plan.job) == digest(undisturbed)
        good = caught and within and named and told[0]["step"] == before
        flip = {"workers": workers, "rank": plan.rank, "bit": plan.bit, "steps": at - plan.step}
        seen.append(flip if good else {**flip, "told": told})
        record.add(Try(plan.step, good, equal, at - before))
    record.notes["flips"] = seen


def a_flip(tmp_path: Path, store: Store, tasks: Path, **plan: Any) -> tuple[MetaTrainJob, Flip]:
    """A run that nothing disturbs, done, and the plan of one in which a bit flips."""
    undisturbed = small(tmp_path / "undisturbed", store, tasks)
    launch_local(Job("pipeline.training.meta_train:run", undisturbed, 1), tmp_path / "l")
    job = small(tmp_path / "run", store, tasks)
    return undisturbed, Flip(job=job, rank=1, done=tmp_path / "run" / "done", **plan)


@pytest.mark.slow
def test_a_flip_that_makes_the_loss_no_number_is_not_blamed_on_the_data(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run would be stopped, or good groups left out: but only one worker sees such a loss.

    The bit is of the exponent: the last scale, about 1, becomes one of about 10^38.
    """
    undisturbed, plan = a_flip(tmp_path, blob_store, blob_tasks, step=11, place=0.9985, bit=30)
    capfd.readouterr()
    run_flipped(plan, 2)
    (told,) = told_of("restart", capfd.readouterr().err)
    assert "held other parameters than the rest at step 11," in told["why"], "at once, not at 15"
    assert not list(plan.job.incidents.rglob("incident.json"))
    assert digest(plan.job) == digest(undisturbed)


def test_without_the_check_a_flipped_bit_is_in_the_result(
    blob_store: Store, blob_tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The control: nobody notices, and the weights are others."""
    undisturbed, plan = a_flip(
        tmp_path, blob_store, blob_tasks, step=12, place=0.4, bit=22, guarded=False
    )
    run_flipped(plan, 2)
    assert plan.done.exists()
    assert told_of("restart", capfd.readouterr().err) == []
    assert read_json(plan.job.target / "learner.json")["origin"]["steps"] == NUM_STEPS
    assert digest(plan.job)[0] != digest(undisturbed)[0]
