"""A version that fails on real requests goes by itself; a challenger is tried at no one's cost."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.deploy.registry import Registry
from pipeline.deploy.serve.admission import REFUSED_TAG
from pipeline.deploy.serve.commands import settings_from
from pipeline.deploy.serve.learners import open_database
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.problems import Problem
from pipeline.deploy.serve.replicas import Replicas
from pipeline.deploy.serve.service import is_canary
from pipeline.deploy.serve.settings import Budget
from pipeline.deploy.serve.status import as_text, status_of
from pipeline.deploy.serve.watch import BrokenModelError, Watch
from tests.serve.asking import http, queries, support, vectors
from tests.serve.registered import NAME, fragile_bundle, move_by_hand, register
from tests.serve.service_process import REPOSITORY, ServiceProcess, wait_until

POLL_SECONDS = 0.5
WHITE = vectors(1, 255.0)
RATES = {"requests_per_second": 10_000, "burst": 10_000}
Start = Callable[..., ServiceProcess]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Version 1 is good and champion, version 2 good and another, version 3 fails on white."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "registry"
    folder.mkdir()
    first, _ = register(folder, 1)
    register(folder, 2)
    register(folder, 3, make=fragile_bundle)
    Registry(folder, NAME).promote(first)
    return folder


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts replicas on one database; budget: two failures."""
    begun: list[ServiceProcess] = []

    def begin(**settings: Any) -> ServiceProcess:
        own = {
            "database": f"sqlite:///{tmp_path / 'shared.db'}",
            "poll_seconds": POLL_SECONDS,
            "budget": {"failures": 2},
            "rates": RATES,
            **settings,
        }
        service = ServiceProcess(tmp_path / f"replica-{len(begun)}", NAME, **own)
        begun.append(service)
        service.start(environment={"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"})
        return service

    yield begin
    for service in begun:
        service.stop()


def serves(service: ServiceProcess) -> int | None:
    model = service.readiness()[1]["model"]
    return None if model is None else int(model["version"])


def status(service: ServiceProcess, root: Path) -> dict[str, Any]:
    """What `metaloom release status` knows."""
    settings = settings_from(service.config)
    seen = Replicas(open_database(settings.database)).all()
    return status_of(Registry(root, NAME), seen, settings)


def command(service: ServiceProcess, root: Path) -> str:
    """`metaloom release status`, as a person types it."""
    command = [sys.executable, "-m", "pipeline.cli", "release", "status", "--model", NAME]
    command += ["--config", str(service.config)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_champion_that_fails_is_rolled_back_in_every_replica(root: Path, start: Start) -> None:
    """Only those fail whose request it cannot answer, and only until the budget is spent."""
    replicas = [start(), start()]
    move_by_hand(root, 3)
    for replica in replicas:
        wait_until(lambda one=replica: serves(one) == 3)
    body = {"support": support(), "queries": queries()}
    with http(replicas[0], replicas[0].key()) as web:
        told = []
        for _ in range(10):
            assert web.post("/v1/predict", json=body).status_code == 200
            told.append(web.post("/v1/predict", json={**body, "queries": WHITE}))
        assert [answer.status_code for answer in told] == [500] * 3 + [200] * 7
        assert told[-1].json()["model"]["version"] == 1
    assert serves(replicas[0]) == 1, "at once where it was found"
    wait_until(lambda: serves(replicas[1]) == 1)
    registry = Registry(root, NAME)
    last = registry.promotions()[-1]
    assert (last.kind, last.champion, last.before) == ("rollback", 1, 3)
    assert "error budget is spent: 3 of its latest" in last.reason
    assert "error budget" in registry.version(3).tags[REFUSED_TAG]

    def at_rest() -> bool:
        found = status(replicas[0], root)
        return [one["champion"] for one in found["replicas"]] == [1, 1]

    wait_until(at_rest)
    text = command(replicas[0], root)
    assert "champion    version 1 in 2 of 2 replicas" in text and "rollback to version 1" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_rollback_by_command_is_followed_by_every_replica_within_two_looks(
    root: Path, start: Start
) -> None:
    registry = Registry(root, NAME)
    registry.promote(registry.version(2))
    replicas = [start(), start()]
    assert [serves(one) for one in replicas] == [2, 2]
    registry.rollback()
    for replica, before in [(one, looks(one)) for one in replicas]:
        wait_until(lambda one=replica, two=before + 2: looks(one) >= two)
        assert serves(replica) == 1


def looks(service: ServiceProcess) -> int:
    """That this replica has taken; one more may be on its way."""
    told = re.search(r"^metaloom_looks_total (\S+)$", metrics(service), re.MULTILINE)
    assert told is not None
    return int(float(told[1]))


def test_a_canary_answers_its_share_and_costs_nobody_an_answer(root: Path, start: Start) -> None:
    """The challenger fails on white: the champion answers instead, and the challenger goes."""
    Registry(root, NAME).challenge(Registry(root, NAME).version(3))
    service = start(challenge={"share": 0.5})
    wait_until(lambda: status(service, root)["totals"]["challenger"]["replicas"] == 1)
    with http(service, service.key()) as web:
        names = [
            web.post("/v1/learners", json={"support": support(seed=seed)}).json()["id"]
            for seed in range(30)
        ]
        asked = {"queries": queries()}

        def version(name: str, body: dict[str, Any]) -> int:
            answer = web.post(f"/v1/learners/{name}/predict", json=body)
            assert answer.status_code == 200
            return int(answer.json()["model"]["version"])

        first = [version(name, asked) for name in names]
        assert first == [3 if is_canary(name, 0.5) else 1 for name in names]
        assert {1, 3} == set(first) and first == [version(name, asked) for name in names]
        assert version(names[0], {**asked, "against": "challenger"}) == 3
        assert 'metaloom_serving{role="challenger",version="3"} 1.0' in metrics(service)
        canary = names[first.index(3)]
        for _ in range(4):
            assert version(canary, {"queries": WHITE}) == 1
        assert version(canary, asked) == 1, "the challenger is out"
        assert 'metaloom_serving{role="champion",version="1"} 1.0' in metrics(service)
        assert 'metaloom_serving{role="challenger"' not in metrics(service)
    wait_until(lambda: REFUSED_TAG in Registry(root, NAME).version(3).tags)
    wait_until(lambda: status(service, root)["replicas"][0]["refused"])
    found = status(service, root)
    assert found["replicas"][0]["challenger"] is None
    assert found["wanted"] == {"champion": 1, "challenger": 3}, "its alias stays where it was put"
    assert "error budget" in found["replicas"][0]["refused"][0]["why"]
    assert serves(service) == 1


def test_a_challenger_in_the_shadow_is_compared_and_never_seen(root: Path, start: Start) -> None:
    registry = Registry(root, NAME)
    registry.challenge(registry.version(2))
    service = start(challenge={"shadow": 1.0})
    wait_until(lambda: status(service, root)["totals"]["challenger"]["replicas"] == 1)
    agreed = compared = 0
    with http(service, service.key()) as web:
        for seed in range(12):
            body = {"support": support(ways=4, seed=seed), "queries": queries(5, seed=9000 + seed)}
            answers = [
                web.post("/v1/predict", json={**body, "against": who}).json()
                for who in ("champion", "challenger")
            ]
            assert [one["model"]["version"] for one in answers] == [1, 2]
            tops = [[p["probabilities"][0]["label"] for p in one["predictions"]] for one in answers]
            agreed += sum(a == b for a, b in zip(*tops, strict=True))
            compared += 5

    def counted() -> bool:
        total = status(service, root)["totals"]["challenger"]
        return bool(total["compared"] == compared)

    wait_until(counted)
    total = status(service, root)["totals"]["challenger"]
    assert (total["agreed"], total["failed"]) == (agreed, 0) and 0 < agreed < compared
    assert f"agrees in {agreed / compared:.1%} of {compared}" in as_text(status(service, root))
    assert 'metaloom_answers_total{outcome="differed",version="2"}' in metrics(service)


def metrics(service: ServiceProcess) -> str:
    with http(service) as web:
        return web.get("/metrics").text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_moves_of_the_alias_under_load_fail_no_request(root: Path, start: Start) -> None:
    service = start(poll_seconds=0.1)
    ended, statuses, versions = threading.Event(), list[int](), set[int]()

    def load(seed: int) -> None:
        with http(service, service.key()) as web:
            name = web.post("/v1/learners", json={"support": support(seed=seed)}).json()["id"]
            while not ended.is_set():
                answer = web.post(f"/v1/learners/{name}/predict", json={"queries": queries()})
                statuses.append(answer.status_code)
                versions.add(answer.json()["model"]["version"])

    askers = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
    for asker in askers:
        asker.start()
    for move in range(50):
        number = 2 - move % 2
        move_by_hand(root, number)
        wait_until(lambda wanted=number: serves(service) == wanted)
    ended.set()
    for asker in askers:
        asker.join()
    assert len(service.events("switch")) >= 50
    assert versions == {1, 2} and set(statuses) == {200} and len(statuses) > 200


REF = ModelRef(name="a", version=1, bundle="b")


class _Version:
    ref = REF


def test_the_budget_is_of_the_latest_answers_and_spent_once() -> None:
    spent: list[str] = []
    watch = Watch(Budget(failures=2, answers=10), lambda ref, why: spent.append(why))
    version: Any = _Version()

    def answer(*, fails: bool) -> None:
        try:
            with watch.over(version):
                if fails:
                    raise ZeroDivisionError("no")
        except BrokenModelError:
            assert fails

    for _ in range(5):  # two in ten, for ever: within the budget
        for fails in (True, True, *[False] * 8):
            answer(fails=fails)
    assert not spent
    answer(fails=True), answer(fails=True), answer(fails=True), answer(fails=True)
    assert (
        len(spent) == 1 and "3 of its latest 10 answers failed (ZeroDivisionError: no)" in spent[0]
    )
    watch.begin_anew(version)
    answer(fails=True)
    assert len(spent) == 1, "what was before is forgiven"
    assert watch.tally(version).failed == 1


def test_a_clients_mistake_is_no_failure_of_the_model() -> None:
    watch = Watch(Budget(failures=1), lambda ref, why: pytest.fail(why))
    version: Any = _Version()
    for _ in range(5):
        with pytest.raises(Problem), watch.over(version):
            raise Problem(422, "no picture")
    assert watch.tally(version).failed == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_canarys_share_is_what_was_asked_for(share: float) -> None:
    chosen = [name for name in map(str, range(4000)) if is_canary(name, share)]
    assert abs(len(chosen) / 4000 - share) < 0.03
    assert all(is_canary(name, min(1.0, share + 0.2)) for name in chosen), (
        "a larger share keeps them"
    )
