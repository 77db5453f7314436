"""Ray's workers, driver and nodes killed: the bits of a run that nothing disturbed."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runtime.journal import read_points
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, tries
from tests.chaos.disturbed import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    Disturbed,
    kill_worker,
    long_job,
    undisturbed,
)
from tests.cluster.conftest import RayCluster
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("victim", ["a worker", pytest.param("rank 0", marks=pytest.mark.slow)])
def test_kill_9_of_a_worker(
    victim: str,
    campaign: Callable[[str], Campaign],
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Each step is in the driver's journal at the end, from however many groups of workers."""
    found = campaign(f"kill -9 of {victim}, ray_train")
    found.most_lost = CHECKPOINT_EVERY
    wanted = tries(ci=1, full=10)
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(victim)
    while len(found.tries) < wanted:
        job = long_job(tmp_path / f"killed-{len(found.tries)}", blob_store, blob_tasks)
        run = Disturbed(job, "ray_train", environment=ray_cluster.environment)
        run.start(2)
        outcomes = []
        while len(found.tries) + len(outcomes) < wanted:
            outcome = kill_worker(run, rng, 0 if victim == "rank 0" else None)
            if outcome is None:
                break
            outcomes.append(outcome)
        equal = run.end() == metrics and digest(run.job) == bits
        for outcome in outcomes:
            found.add(dataclasses.replace(outcome, bits_equal=equal))
        steps = {point.step for point, _ in read_points(job.journal)}
        assert steps == set(range(1, NUM_STEPS + 1))


@pytest.mark.slow
def test_kill_9_of_the_driver(
    campaign: Callable[[str], Campaign],
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """The same command again, with other numbers of workers, goes on from our own checkpoints."""
    found = campaign("kill -9 of the driver, ray_train")
    found.most_lost = CHECKPOINT_EVERY
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    rng = random.Random(5)
    job = long_job(tmp_path / "killed", blob_store, blob_tasks)
    run = Disturbed(job, "ray_train", environment=ray_cluster.environment)
    run.start(2)
    outcomes = []
    for again in [3, 1, 2, 3, 2][: tries(ci=1, full=5)]:
        assert run.wait_for_steps(rng.randint(1, CHECKPOINT_EVERY))
        assert run.driver is not None
        run.driver.kill()
        run.driver.wait()
        while run.workers():
            time.sleep(0.05)  # Ray ends them when it sees that their driver is gone
        before = run.steps()
        run.start(again)
        lost, seconds = run.wait_until_it_goes_on(before)
        outcomes.append(Try(len(before), survived=True, steps_lost=lost, seconds=seconds))
    equal = run.end() == metrics and digest(run.job) == bits
    for outcome in outcomes:
        found.add(dataclasses.replace(outcome, bits_equal=equal))


@pytest.mark.slow
def test_a_node_dies_and_another_comes(
    campaign: Callable[[str], Campaign],
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """Elastic, (1, 2) workers on nodes of one label: it goes on when there is a node again."""
    found = campaign("kill -9 of a node, ray_train")
    found.most_lost = CHECKPOINT_EVERY
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    environment = {**ray_cluster.environment, "METALOOM_NODE_LABELS": "metaloom-node=node"}
    job = long_job(tmp_path / "killed", blob_store, blob_tasks)
    run = Disturbed(job, "ray_train", environment=environment, min_workers=1)
    run.start(2)
    outcomes = []
    for _ in range(tries(ci=1, full=5)):
        assert run.wait_for_steps(CHECKPOINT_EVERY)
        ray_cluster.node.kill()
        before = run.steps()
        ray_cluster.node.start()
        lost, seconds = run.wait_until_it_goes_on(before)
        outcomes.append(Try(len(before), survived=True, steps_lost=lost, seconds=seconds))
    equal = run.end() == metrics and digest(run.job) == bits
    for outcome in outcomes:
        found.add(dataclasses.replace(outcome, bits_equal=equal))


def test_a_node_is_preempted(
    campaign: Callable[[str], Campaign],
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """A node that says it will go: a checkpoint, then on with what is left, and nothing is lost."""
    found = campaign("a node pre-empted, ray_train")
    found.most_lost = 0
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    job = long_job(tmp_path / "preempted", blob_store, blob_tasks, num_steps=NUM_STEPS)
    environment = {**ray_cluster.environment, "METALOOM_NODE_LABELS": "metaloom-node=node"}
    run = Disturbed(job, "ray_train", environment=environment)
    run.start(2)
    assert run.wait_for_steps(CHECKPOINT_EVERY)
    begin = time.monotonic()
    script = "import sys; from tests.chaos.test_ray_kills import preempt; preempt()"
    subprocess.run(
        [sys.executable, "-c", script], env=run.child_environment(), check=True, timeout=120
    )
    while "stopped behind the checkpoint of step" not in run.log():
        assert run.is_running(), run.log()
        time.sleep(0.05)
    before = run.steps()
    ray_cluster.node.kill()
    ray_cluster.node.start()
    lost, _ = run.wait_until_it_goes_on(before)
    equal = run.end() == metrics and digest(run.job) == bits
    seconds = time.monotonic() - begin
    found.add(Try(len(before), survived=True, bits_equal=equal, steps_lost=lost, seconds=seconds))


def preempt() -> None:
    """Tell the cluster that the node labelled `node` goes away in half a minute."""
    import ray
    from ray._raylet import GcsClient

    ray.init(log_to_driver=False)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    (node,) = [n for n in ray.nodes() if n["Alive"] and n["Labels"].get("metaloom-node") == "node"]
    accepted, why = gcs.drain_node(
        node["NodeID"],
        2,
        "a test",
        int((time.time() + 30) * 1000),  # 2: pre-emption
    )
    assert accepted, why
