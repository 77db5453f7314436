"""Ray's nodes killed, pre-empted, or more and fewer of them: the bits of an undisturbed run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from infra.local.servers import Server
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, tries
from tests.chaos.disturbed import CHECKPOINT_EVERY, Disturbed, disturb, long_job, undisturbed
from tests.cluster.conftest import RayCluster, needs
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
_CPUS = "METALOOM_CLUSTER_CPUS"


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
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    environment = {**ray_cluster.environment, "METALOOM_NODE_LABELS": "metaloom-node=node"}

    def begin(name: str) -> Disturbed:
        job = long_job(tmp_path / name, blob_store, blob_tasks)
        run = Disturbed(job, "ray_train", environment=environment, min_workers=1)
        run.start(2)
        return run

    def kill(run: Disturbed) -> Try | None:
        if not run.wait_for_steps(CHECKPOINT_EVERY):
            return None
        ray_cluster.node.kill()
        before = run.steps()
        ray_cluster.node.start()
        lost, seconds = run.wait_until_it_goes_on(before)
        if lost is None:
            return None
        return Try(len(before), survived=True, steps_lost=lost, seconds=seconds)

    disturb(found, tries(ci=1, full=5), begin, kill, expected)


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """Nodes with two CPUs each, so that four workers need both."""
    needs("ray")
    monkeypatch.setenv(_CPUS, "2")
    folder = Path(tempfile.mkdtemp(prefix="metaloom-small-"))
    head, node = [Server(name=name, cluster=folder) for name in ("ray_head", "ray_node")]
    cluster = RayCluster(head=head, node=node)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_world_shrinks_and_grows_while_the_run_goes_on(
    campaign: Callable[[str], Campaign],
    small_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four workers; two when a node of two is dead; three when one of one has come."""
    found = campaign("worlds of 4, 2 and 3 while it runs, ray_train")
    found.most_lost = CHECKPOINT_EVERY
    length = 4000
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=length)
    job = long_job(tmp_path / "run", blob_store, blob_tasks, num_steps=length)
    run = Disturbed(job, "ray_train", environment=small_cluster.environment, min_workers=1)
    run.start(4)

    def wait_for(world: int) -> None:
        deadline = time.monotonic() + 120
        while _worlds(run)[-1:] != [world]:
            assert run.is_running() and time.monotonic() < deadline, run.log()
            time.sleep(0.1)
        assert run.wait_for_steps(len(run.steps()) + CHECKPOINT_EVERY)

    wait_for(4)
    small_cluster.node.kill()
    before = run.steps()
    lost, seconds = run.wait_until_it_goes_on(before)
    assert lost is not None
    wait_for(2)
    monkeypatch.setenv(_CPUS, "1")
    small_cluster.node.start()
    wait_for(3)
    equal = run.end() == metrics and digest(job) == bits
    found.add(Try(len(before), True, equal, steps_lost=lost, seconds=seconds))
    assert [world for world, _ in groupby(_worlds(run))] == [4, 2, 3]


def _worlds(run: Disturbed) -> list[int]:
    """Of how many workers each main worker was one; a node that comes again tells old lines again."""
    told = re.findall(r'"rank": 0, "process": (\d+), "workers": (\d+)', run.log())
    return [int(workers) for _, workers in dict.fromkeys(told)]


@pytest.mark.slow
def test_a_node_is_preempted(
    campaign: Callable[[str], Campaign],
    ray_cluster: RayCluster,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
) -> None:
    """A node that says it will go: a checkpoint, then on with what is left, and nothing is lost.

    However far the next checkpoint would be.
    """
    found = campaign("a node pre-empted, ray_train")
    found.most_lost = 0
    length = {"num_steps": 6000, "patience": 6000, "checkpoint_every": 6000}
    length["validate_every"] = 3000
    metrics, bits = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, **length)
    job = long_job(tmp_path / "preempted", blob_store, blob_tasks, **length)
    environment = {**ray_cluster.environment, "METALOOM_NODE_LABELS": "metaloom-node=node"}
    run = Disturbed(job, "ray_train", environment=environment)
    with subprocess.Popen(
        [sys.executable, "-c", "from tests.chaos.test_ray_kills import preempt; preempt()"],
        env=run.child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as cloud:
        assert cloud.stdout is not None and cloud.stdout.readline() == "ready\n"
        run.start(2)
        assert run.wait_for_steps(CHECKPOINT_EVERY)
        begin = time.monotonic()
        cloud.communicate("go\n", timeout=60)
    assert cloud.returncode == 0
    while "are going away" not in " ".join(run.restarts_told()):
        assert run.is_running(), run.log()
        time.sleep(0.05)
    before = run.steps()
    ray_cluster.node.kill()
    ray_cluster.node.start()
    lost, _ = run.wait_until_it_goes_on(before)
    assert lost is not None
    equal = run.end() == metrics and digest(run.job) == bits
    seconds = time.monotonic() - begin
    found.add(Try(len(before), survived=True, bits_equal=equal, steps_lost=lost, seconds=seconds))


def preempt() -> None:
    """Once asked, tell the cluster that the node labelled `node` goes away in half a minute."""
    import ray
    from ray._raylet import GcsClient

    ray.init(log_to_driver=False)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    (node,) = [n for n in ray.nodes() if n["Alive"] and n["Labels"].get("metaloom-node") == "node"]
    print("ready", flush=True)
    input()
    accepted, why = gcs.drain_node(
        node["NodeID"],
        2,
        "a test",
        int((time.time() + 30) * 1000),  # 2: pre-emption
    )
    assert accepted, why
