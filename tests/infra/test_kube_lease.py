"""One retraining at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.cluster import repro
from pipeline.cluster.kube import lease
from pipeline.cluster.kube.kinds import LEASES, PROGRESS_NOTE, RETRAIN
from pipeline.cluster.kube.lease import HeldError, LostError, holder_of, single_flight
from tests.conftest import REPOSITORY
from tests.infra.api_server.status import RefusedError
from tests.infra.kube_cluster import Cluster, api_server, cluster, eventually, typed

__all__ = ["api_server", "cluster"]

RACER = """
import sys, time
from pathlib import Path
from pipeline.cluster.kube.connect import connect
from pipeline.cluster.kube.lease import HeldError, single_flight
namespace, holder, folder = sys.argv[1:]
kube = connect(namespace)
kube.ask("/version")
(Path(folder) / f"ready-{holder}").touch()
while not (Path(folder) / "go").exists():
    time.sleep(0.001)
try:
    with single_flight(kube, holder, duration_seconds=5, renew_seconds=1, grace_seconds=0):
        print("won", flush=True)
        while not (Path(folder) / "end").exists():
            time.sleep(0.01)
except HeldError as error:
    print("held by", error.holder, flush=True)
"""


def race(cluster: Cluster, folder: Path, holders: list[str]) -> list[str]:
    folder.mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, cluster.namespace, holder, str(folder)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for holder in holders
    ]
    eventually(lambda: len(list(folder.glob("ready-*"))) == len(holders), 60)
    (folder / "go").touch()
    first = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    (folder / "end").touch()
    for racer in racers:
        racer.wait(30)
        assert racer.stdout is not None
        racer.stdout.close()
    return first


@pytest.mark.parametrize("before", ["no lease", "a free lease"])
def test_of_two_processes_exactly_one_wins(before: str, cluster: Cluster, tmp_path: Path) -> None:
    if before == "a free lease":
        cluster.kube.create(LEASES, typed(LEASES, {"metadata": {"name": RETRAIN}}))
    for number in range(3):
        told = race(cluster, tmp_path / str(number), ["left", "right"])
        winner = "left" if told[0] == "won" else "right"
        assert sorted(told) == sorted(["won", f"held by {winner}"])
    assert holder_of(cluster.kube.get(LEASES, RETRAIN)) == "", "it was let go"


def test_it_is_renewed_and_shows_how_far_the_work_is(cluster: Cluster) -> None:
    def stamp() -> str:
        return str(cluster.kube.get(LEASES, RETRAIN)["spec"]["renewTime"])

    with single_flight(
        cluster.kube, "us", duration_seconds=2, renew_seconds=0.5, grace_seconds=0
    ) as held:
        first = stamp()
        held.note({"run": "us", "stage": "meta_train", "step": 7})
        eventually(lambda: PROGRESS_NOTE in _notes(cluster))
        told = json.loads(_notes(cluster)[PROGRESS_NOTE])
        assert (told["stage"], told["step"]) == ("meta_train", 7) and told["updated"]
        eventually(lambda: stamp() > first)
        time.sleep(2.5)
        with (
            pytest.raises(HeldError, match=r"held by us.*one retraining at a time"),
            single_flight(cluster.kube, "them", renew_seconds=0.5),
        ):
            pass
        held.check()
    assert json.loads(_notes(cluster)[PROGRESS_NOTE])["step"] == 7


def _notes(cluster: Cluster) -> dict[str, str]:
    return cluster.kube.get(LEASES, RETRAIN)["metadata"].get("annotations") or {}


def _left_behind(cluster: Cluster, holder: str, renewed: str) -> None:
    spec = {"holderIdentity": holder, "leaseDurationSeconds": 60, "renewTime": renewed}
    cluster.kube.create(LEASES, typed(LEASES, {"metadata": {"name": RETRAIN}, "spec": spec}))


def test_one_that_has_run_out_is_taken_over(cluster: Cluster) -> None:
    _left_behind(cluster, "gone", "2020-01-01T00:00:00.000000Z")
    with single_flight(cluster.kube, "us", renew_seconds=0.5):
        spec = cluster.kube.get(LEASES, RETRAIN)["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("us", 1)


def test_a_holder_whose_clock_is_behind_keeps_it(cluster: Cluster) -> None:
    """Its stamps are old, but it writes new ones."""
    import threading

    _left_behind(cluster, "slow clock", "2020-01-01T00:00:00.000000Z")
    ending = threading.Event()

    def renew() -> None:
        number = 0
        while not ending.wait(0.2):
            number += 1
            stamp = f"2020-01-01T00:00:{number % 60:02}.000000Z"
            cluster.kube.patch(LEASES, RETRAIN, {"spec": {"renewTime": stamp}})

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        with (
            pytest.raises(HeldError, match="slow clock"),
            single_flight(cluster.kube, "us", renew_seconds=0.5),
        ):
            pass
    finally:
        ending.set()
        renewer.join()


def test_the_same_run_takes_it_again_and_its_old_process_stops(cluster: Cluster) -> None:
    """A driver's node is cut off, its pod comes again elsewhere; then the node is back."""
    with single_flight(cluster.kube, "run", renew_seconds=0.3) as old:
        with single_flight(cluster.kube, "run", renew_seconds=0.3) as new:
            eventually(lambda: old.lost)
            with pytest.raises(LostError, match="no two work at once"):
                old.check()
            new.check()
        assert holder_of(cluster.kube.get(LEASES, RETRAIN)) == ""


@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_a_holder_that_cannot_renew_stops_before_it_has_run_out(
    server: str, cluster: Cluster
) -> None:
    """So long before that what it does can end: by the Lease's own stamp, when the word comes."""
    told: list[float] = []
    with single_flight(
        cluster.kube, "us", duration_seconds=12, renew_seconds=1, grace_seconds=8
    ) as held:
        held.on_lost = lambda: told.append(time.time())
        if server == "refuses":
            fault = RefusedError(503, "ServiceUnavailable", "no leader")
            cluster.ours.refuse("update", "leases", fault)
        else:
            cluster.ours.be_silent("update", "leases")
        eventually(lambda: told)
        found = cluster.kube.get(LEASES, RETRAIN)
        renewed = datetime.fromisoformat(found["spec"]["renewTime"]).timestamp()
        assert renewed + 12 - 8 <= told[0] and holder_of(found, now=told[0]) == "us"
        why = "no leader" if server == "refuses" else "does not answer"
        with pytest.raises(LostError, match=f"could not be renewed: .*{why}"):
            held.check()
    assert holder_of(cluster.kube.get(LEASES, RETRAIN), now=told[0]) == "us"  # it runs out


def test_there_is_time_for_a_checkpoint_before_it_runs_out() -> None:
    """A stage that is told to stop is killed when its time is over, not later."""
    assert repro.GRACE_SECONDS < lease.GRACE_SECONDS
    assert lease.GRACE_SECONDS + 2 * lease.RENEW_SECONDS < lease.DURATION_SECONDS


def test_somebody_else_s_touch_is_no_loss(cluster: Cluster) -> None:
    with single_flight(cluster.kube, "us", renew_seconds=0.3) as held:
        cluster.kube.patch(LEASES, RETRAIN, {"metadata": {"labels": {"k": "v"}}})
        before = cluster.kube.get(LEASES, RETRAIN)["spec"]["renewTime"]
        eventually(lambda: cluster.kube.get(LEASES, RETRAIN)["spec"]["renewTime"] > before)
        held.check()
        assert cluster.kube.get(LEASES, RETRAIN)["metadata"]["labels"] == {"k": "v"}
