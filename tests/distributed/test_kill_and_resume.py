"""kill -9 at random steps, on random ranks, in changing worlds: the same bits, little work lost."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.core.errors import TrainingError
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainJob
from tests.distributed.small_run import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    digest,
    last_state,
    make_job,
    run,
)


def last_step(job: MetaTrainJob) -> int:
    return max((point.step for point, _ in read_points(job.journal)), default=0)


def checkpointed_step(job: MetaTrainJob) -> int:
    saved = load_checkpoint(job.checkpoints)
    return 0 if saved is None else int(saved.state["progress"]["step"])


def worker_pids(scratch: Path) -> dict[int, int]:
    """Process ids by rank, of the workers whose files are in a launcher's folder."""
    pids = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(scratch).encode() in command:
            rank = next(v for v in environment if v.startswith(b"RANK="))
            pids[int(rank.removeprefix(b"RANK="))] = int(entry.name)
    return pids


def run_and_kill(job: MetaTrainJob, workers: int, at_step: int, rng: random.Random) -> bool:
    """Run until a step is reached, kill one worker; False if the run ended before that."""
    job.journal.unlink(missing_ok=True)
    ended = threading.Event()
    failure: list[BaseException] = []

    def train() -> None:
        try:
            run(job, workers)
        except TrainingError as error:
            failure.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=train)
    thread.start()
    while last_step(job) < at_step and not ended.is_set():
        time.sleep(0.002)
    if not ended.is_set():
        time.sleep(rng.uniform(0, 0.02))  # anywhere in the step, or in the writing of a checkpoint
        pids = worker_pids(job.target.parent / f"launch-{workers}")
        if pids:
            os.kill(pids[rng.choice(sorted(pids))], signal.SIGKILL)
    thread.join()
    return bool(failure)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [6, 200])
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(
    kills: int, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    undisturbed = make_job(tmp_path / "undisturbed", blob_store, blob_tasks)
    metrics = run(undisturbed, 2)
    rng = random.Random(7)
    campaign = []
    round_ = 0
    while len(campaign) < kills:
        job = make_job(tmp_path / f"killed-{round_}", blob_store, blob_tasks)
        round_ += 1
        while True:
            workers = rng.choice([1, 2, 3])
            started_at = checkpointed_step(job)
            target = started_at + rng.randint(2, 3 * CHECKPOINT_EVERY)
            if len(campaign) >= kills or target >= NUM_STEPS:
                assert run(job, workers) == metrics
                break
            if not run_and_kill(job, workers, target, rng):
                break
            reached, kept = last_step(job), checkpointed_step(job)
            row = {"workers": workers, "started_at": started_at, "progress_at_kill": reached}
            campaign.append({**row, "steps_lost": reached - kept})
        assert digest(job) == digest(undisturbed)
        assert last_state(job) == last_state(undisturbed), "the optimiser's too"
        state = json.loads((job.target / "history.json").read_text())
        assert [entry["step"] for entry in state] == list(range(1, NUM_STEPS + 1))
    print(
        f"kills: {len(campaign)}, hash differences: 0, most steps lost: "
        f"{max(row['steps_lost'] for row in campaign)}; {campaign}"
    )
    for row in campaign:
        assert row["progress_at_kill"] > row["started_at"], (
            "a kill before any progress proves nothing"
        )
        assert row["steps_lost"] <= CHECKPOINT_EVERY


def test_every_episode_goes_into_the_weights_once(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """The ledger that is committed with the weights holds each meta-batch once, kills or not."""
    job = make_job(tmp_path / "run", blob_store, blob_tasks)
    rng = random.Random(3)
    kills = sum(run_and_kill(job, 2, step, rng) for step in (8, 23))
    assert kills == 2
    assert run(job, 2)["steps"] == NUM_STEPS
    saved = load_checkpoint(job.checkpoints)
    assert saved is not None
    assert saved.state["progress"]["ledger"] == [[0, NUM_STEPS]]
    assert saved.state["progress"]["position"] == NUM_STEPS
