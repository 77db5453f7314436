"""kill -9, SIGTERM and SIGSTOP at random steps: the bits of a run that nothing disturbed."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import StoppedError
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, tries
from tests.chaos.disturbed import CHECKPOINT_EVERY, Disturbed, kill_worker, long_job, undisturbed
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(7200)]
_MANY = 10_000

KILL_EVERY_SECONDS = 180.0


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
@pytest.mark.parametrize("victim", ["a worker", "rank 0"])
def test_kill_9(
    launcher: str,
    victim: str,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    found = campaign(f"kill -9 of {victim}, {launcher}")
    found.most_lost = CHECKPOINT_EVERY
    wanted = tries(ci=3, full=40) if launcher == "local" else tries(ci=1, full=10)
    rank = 0 if victim == "rank 0" else None
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(f"{launcher} {victim}")
    while len(found.tries) < wanted:
        name = f"killed-{len(found.tries)}"
        run = Disturbed(long_job(tmp_path / name, blob_store, blob_tasks), launcher)
        run.start(rng.choice([2, 3]))
        outcomes = []
        while len(found.tries) + len(outcomes) < wanted:
            outcome = kill_worker(run, rng, rank)
            if outcome is None:
                break
            outcomes.append(outcome)
        equal = run.end() == metrics and digest(run.job) == bits
        for outcome in outcomes:
            found.add(dataclasses.replace(outcome, bits_equal=equal))
    costs = sorted(t.seconds or 0.0 for t in found.tries)
    goodput = 1 - costs[len(costs) // 2] / KILL_EVERY_SECONDS
    found.notes["goodput_at_one_kill_in_3_minutes"] = round(goodput, 3)


@pytest.mark.parametrize("victim", ["the driver", "the whole node"])
def test_the_same_command_again_after_the_driver_or_the_node_was_killed(
    victim: str,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Started again with other numbers of workers: 4, then 2, then 3."""
    found = campaign(f"kill -9 of {victim}, local")
    found.most_lost = CHECKPOINT_EVERY
    wanted = tries(ci=3, full=20)
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(victim)
    while len(found.tries) < wanted:
        name = f"killed-{len(found.tries)}"
        run = Disturbed(long_job(tmp_path / name, blob_store, blob_tasks), "local")
        outcomes: list[Try] = []
        run.start(4)
        while len(found.tries) + len(outcomes) < wanted:
            if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
                break
            before = run.steps()
            assert run.driver is not None
            run.kill([run.driver.pid] if victim == "the driver" else run.tree())
            run.driver.wait()
            while victim == "the driver" and run.workers():
                time.sleep(0.05)  # they notice that they are alone
            before = run.steps()
            run.start([2, 3, 4][len(outcomes) % 3])
            lost, seconds = run.wait_until_it_goes_on(before)
            outcomes.append(
                Try(progress=len(before), survived=True, steps_lost=lost, seconds=seconds)
            )
        equal = run.end() == metrics and digest(run.job) == bits
        for outcome in outcomes:
            found.add(dataclasses.replace(outcome, bits_equal=equal))


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_sigterm_loses_nothing(
    launcher: str,
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    found = campaign(f"SIGTERM, {launcher}")
    found.most_lost = 0
    wanted = tries(ci=3, full=25) if launcher == "local" else tries(ci=1, full=5)
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(launcher)
    while len(found.tries) < wanted:
        name = f"stopped-{len(found.tries)}"
        run = Disturbed(long_job(tmp_path / name, blob_store, blob_tasks), launcher)
        outcomes = []
        run.start(2)
        while len(found.tries) + len(outcomes) < wanted:
            if not run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY)):
                break
            time.sleep(rng.uniform(0, 0.02))
            assert run.driver is not None
            begin = time.monotonic()
            run.driver.send_signal(signal.SIGTERM)
            try:
                run.end()
                break  # the last step was done before the signal was heard
            except StoppedError as error:
                said = str(error)
            seconds = time.monotonic() - begin
            before = run.steps()
            assert f"step {run.kept()}, as asked" in said
            survived = seconds < 10 and not run.workers()
            lost = max(before) - run.kept()
            outcomes.append(
                Try(progress=len(before), survived=survived, steps_lost=lost, seconds=seconds)
            )
            run.start(rng.choice([1, 2, 3]))
        equal = run.end() == metrics and digest(run.job) == bits
        for outcome in outcomes:
            found.add(dataclasses.replace(outcome, bits_equal=equal))


def test_a_stopped_worker_is_named_and_the_run_goes_on(
    campaign: Callable[[str], Campaign],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    found = campaign("SIGSTOP of a worker, local")
    found.most_lost = CHECKPOINT_EVERY
    timeout = 4.0
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(11)
    while len(found.tries) < tries(ci=2, full=25):
        job = long_job(tmp_path / f"stopped-{len(found.tries)}", blob_store, blob_tasks)
        environment = {"METALOOM_TIMEOUT_SECONDS": str(timeout)}
        run = Disturbed(job, "local", environment=environment)
        workers = rng.choice([2, 3, 4])
        run.start(workers)
        assert run.wait_for_steps(rng.randint(1, 3 * CHECKPOINT_EVERY))
        rank = rng.randrange(workers)
        before = run.steps()
        begin = time.monotonic()
        os.kill(run.workers()[rank], signal.SIGSTOP)
        while '"restart"' not in run.log():
            assert time.monotonic() - begin < 60, run.log()
            time.sleep(0.02)
        detected = time.monotonic() - begin
        named = re.search(r"worker (\d+) does not answer", run.log())
        lost, _ = run.wait_until_it_goes_on(before)
        equal = run.end() == metrics and digest(run.job) == bits
        found.add(
            Try(
                progress=len(before),
                survived=named is not None and int(named[1]) == rank,
                bits_equal=equal,
                steps_lost=lost,
                seconds=detected,
            )
        )
    late = max(t.seconds or 0.0 for t in found.tries) - timeout
    found.notes["most_seconds_behind_the_timeout"] = round(late, 3)


def test_without_checkpoints_the_campaign_fails(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """The guard switched off: a killed run then loses more than one interval."""
    job = long_job(tmp_path / "run", blob_store, blob_tasks, checkpoint_every=NEVER)
    run = Disturbed(job, "local")
    run.start(2)
    assert run.wait_for_steps(2 * CHECKPOINT_EVERY)
    before = run.steps()
    run.kill([run.workers()[0]])
    lost, _ = run.wait_until_it_goes_on(before)
    assert lost > CHECKPOINT_EVERY
    run.kill(run.tree())


NEVER = 1_000_000
