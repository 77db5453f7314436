"""PostgreSQL or MLflow restarted, a release killed, two at once: one champion, no half version."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.servers import Server
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.registry import BUNDLE_TAG, PASSED, SMOKE_TAG, Registry
from tests.chaos.campaign import Campaign, Try, is_full, tries
from tests.chaos.hostile import Hostile
from tests.cluster.conftest import cluster_folder, mlflow_server, postgres, s3  # noqa: F401
from tests.unit.test_promotions import is_fair, run_races
from tests.unit.test_registry import EXAMPLE
from tests.unit.tiny_learner import tiny_bundle

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600 if is_full() else 1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
OUTAGE_SECONDS = 20.0 if is_full() else 2.0
TAGS = {SMOKE_TAG: PASSED, "git.commit": "0" * 40}
REGISTER = """
import sys
from pathlib import Path
from pipeline.deploy.registry import Registry
from tests.chaos.test_registry_faults import EXAMPLE, TAGS
from tests.unit.tiny_learner import tiny_bundle

root, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
version, new = Registry(root, name).register(tiny_bundle(root / "own", seed), EXAMPLE, tags=TAGS)
print(version.number, new)
"""


@pytest.fixture(scope="module")
def only_proxy(mlflow_server: Server) -> Iterator[Hostile]:  # noqa: F811
    """One for all: MLflow's client remembers where artifacts were, for the life of a process."""
    with Hostile(mlflow_server.record.url).serving() as one, pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_server.environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", one.url)
        yield one


@pytest.fixture
def proxy(only_proxy: Hostile, postgres: Server, mlflow_server: Server) -> Iterator[Hostile]:  # noqa: F811
    postgres.start()  # a test before may have failed while they were down
    mlflow_server.start()
    yield only_proxy
    only_proxy.recover()


class Outage:
    """A server killed at the n-th call that passes the proxy, and started again a little later."""

    def __init__(self, server: Server, proxy: Hostile, at: int) -> None:
        self.progress = 0
        self._server, self._at = server, len(proxy.calls) + at
        self._begin = len(proxy.calls)
        self._back: threading.Thread | None = None
        self._lock = threading.Lock()
        proxy.on_call = self._look

    def _look(self, number: int) -> None:
        with self._lock:
            if number < self._at or self.progress:
                return
            self.progress = number - self._begin
            self._server.kill()
            self._back = threading.Thread(target=self._come_back)
            self._back.start()

    def _come_back(self) -> None:
        time.sleep(OUTAGE_SECONDS)
        self._server.start()

    def over(self) -> float:
        """Wait for the server; returns how many calls had been made when it went."""
        if self._back is not None:
            self._back.join()
        return float(self.progress)


_names = (f"faults-{uuid.uuid4().hex[:8]}" for _ in itertools.count())


def is_registered_once(registry: Registry, bundle: Bundle, tmp_path: Path) -> bool:
    """One version of this bundle, whole and with all its tags, and no other that looks like ours."""
    versions = registry.versions()
    target = tmp_path / f"fetched-{registry.name}"
    return (
        [version.digest for version in versions] == [bundle.digest]
        and all(TAGS.items() <= version.tags.items() for version in versions)
        and registry.fetch(versions[0], target).digest == bundle.digest
    )


def num_calls(proxy: Hostile, act: Callable[[], Any]) -> int:
    before = len(proxy.calls)
    act()
    return len(proxy.calls) - before


def moments(total: int, ci: int) -> list[int]:
    """At which call the fault comes: every one in the full size, else evenly spread over them.

    A few before the end of what was counted: the number differs a little from try to try.
    """
    last = total - 3
    if is_full():
        return list(range(1, last + 1))
    return [1 + round((i + 1) * (last - 1) / (ci + 1)) for i in range(ci)]


def try_register(proxy: Hostile, server: Server, bundle: Bundle, tmp_path: Path, at: int) -> Try:
    """One registration with an outage at its n-th call."""
    registry = Registry(tmp_path, next(_names))
    outage = Outage(server, proxy, at)
    begin = time.monotonic()
    _, new = registry.register(bundle, EXAMPLE, tags=TAGS)
    seconds = time.monotonic() - begin
    progress = outage.over()
    again, anew = registry.register(bundle, EXAMPLE, tags=TAGS)
    good = (new, anew, again.number) == (True, False, 1)
    whole = is_registered_once(registry, bundle, tmp_path)
    if not (good and whole):
        print(f"at call {at}: {good=} {whole=}", [(v.number, v.tags) for v in registry.versions()])
    return Try(progress, good and whole, seconds=seconds)


@pytest.mark.slow
def test_postgresql_restarted_during_a_registration(
    campaign: Callable[[str], Campaign],
    proxy: Hostile,
    postgres: Server,  # noqa: F811
    mlflow_server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    record = campaign("PostgreSQL restarted during a registration")
    bundle = tiny_bundle(tmp_path, 0)
    registry = Registry(tmp_path, next(_names))
    total = num_calls(proxy, lambda: registry.register(bundle, EXAMPLE, tags=TAGS))
    seeds = itertools.count(1)  # a bundle of its own for each, or the run of one before is used
    for at in moments(total, ci=1):
        record.add(try_register(proxy, postgres, tiny_bundle(tmp_path, next(seeds)), tmp_path, at))
    record.notes["calls_of_a_registration"] = total
    if not is_full():
        return
    other = campaign("MLflow's server killed during a registration")
    for at in moments(total, ci=2)[1:]:
        another = tiny_bundle(tmp_path, next(seeds))
        other.add(try_register(proxy, mlflow_server, another, tmp_path, at))


@pytest.mark.slow
def test_postgresql_restarted_during_a_promotion_and_a_rollback(
    campaign: Callable[[str], Campaign],
    proxy: Hostile,
    postgres: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    record = campaign("PostgreSQL restarted during a promotion or a rollback")
    registry = Registry(tmp_path, next(_names))
    versions = [
        registry.register(tiny_bundle(tmp_path, seed), EXAMPLE, tags=TAGS)[0] for seed in (0, 1)
    ]
    registry.promote(versions[0])
    total = num_calls(proxy, lambda: registry.promote(versions[1]))
    back = num_calls(proxy, registry.rollback)
    for at in moments(min(total, back), ci=3):
        for act, expected in (
            (lambda: registry.promote(versions[1]), {"champion": 2, "previous": 1}),
            (registry.rollback, {"champion": 1}),
        ):
            outage = Outage(postgres, proxy, at)
            begin = time.monotonic()
            act()
            seconds = time.monotonic() - begin
            progress = outage.over()
            good = (
                registry.aliases() == expected
                and registry.standing().champion == expected["champion"]
            )
            record.add(Try(progress, good, seconds=seconds))


@pytest.mark.slow
def test_a_release_killed_at_any_moment_is_made_up_for_by_the_next(
    campaign: Callable[[str], Campaign],
    proxy: Hostile,
    tmp_path: Path,
) -> None:
    """kill -9 of the process that registers; then the same registration, from another process."""
    record = campaign("a release killed during its registration")
    bundle = tiny_bundle(tmp_path, 0)
    total = num_calls(
        proxy, lambda: Registry(tmp_path, next(_names)).register(bundle, EXAMPLE, tags=TAGS)
    )
    for at in moments(total, ci=3)[1:]:
        name = next(_names)
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", REGISTER, str(tmp_path / name), name, "0"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        begin, started = len(proxy.calls), threading.Event()
        process: list[subprocess.Popen[bytes]] = []

        def look(
            number: int,
            begin: int = begin,
            at: int = at,
            process: Any = process,
            started: threading.Event = started,
        ) -> None:
            if number - begin >= at:
                started.wait()
                process[0].send_signal(signal.SIGKILL)

        proxy.on_call = look
        process.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        started.set()
        killed = process[0].wait(timeout=120) == -signal.SIGKILL
        progress = len(proxy.calls) - begin
        proxy.recover()
        registry = Registry(tmp_path, name)
        half = [v for v in registry.versions() if BUNDLE_TAG not in v.tags]
        registry.register(bundle, EXAMPLE, tags=TAGS)
        good = killed and not half and is_registered_once(registry, bundle, tmp_path)
        record.add(Try(progress, good))


def test_two_releases_promoting_at_once(
    campaign: Callable[[str], Campaign],
    proxy: Hostile,
    mlflow_server: Server,  # noqa: F811
) -> None:
    import mlflow

    record = campaign("two releases promoting at once")
    client = mlflow.MlflowClient(mlflow_server.record.url, mlflow_server.record.url)
    told = run_races(client, mlflow_server.record.url, tries(ci=2, full=200))
    for one in told:
        # Both had read the same standing and both wrote a record: one step each.
        record.add(Try(len(one), is_fair(one)))
    record.notes["double_wins"] = sum(all(not message for message in one.values()) for one in told)
    record.notes["without_a_winner"] = sum(all(one.values()) for one in told)
