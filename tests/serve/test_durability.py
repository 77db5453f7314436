"""What was acknowledged is there after any end of the process (S6, S7)."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import pytest

from pipeline.deploy.bundle import Bundle
from tests.serve.asking import answer_on, connection, http, is_problem, queries, support
from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import tiny_bundle

TEACHERS = 8
RATES = {"requests_per_second": 10_000.0, "burst": 100_000}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def teach_until_it_ends(
    service: ServiceProcess, key: str, numbers: count[int], acknowledged: list[tuple[int, str]]
) -> None:
    """Teach one learner after another; note each that was acknowledged."""
    with http(service, key) as web:
        while True:
            number = next(numbers)
            try:
                answer = web.post("/v1/learners", json={"support": support(seed=number)})
            except httpx.HTTPError:
                return
            if answer.status_code == 201:
                acknowledged.append((number, answer.json()["id"]))


def answers(web: httpx.Client, learners: list[str]) -> list[str]:
    """To the same queries, as text: every bit counts."""
    body = {"queries": queries(3)}
    found = [web.post(f"/v1/learners/{name}/predict", json=body) for name in learners]
    assert [one.status_code for one in found] == [200] * len(learners)
    return [one.text for one in found]


def killed_in_the_middle(service: ServiceProcess, key: str, enough: int) -> list[tuple[int, str]]:
    """Kill the process when so many learners are acknowledged, and more are being made."""
    acknowledged: list[tuple[int, str]] = []
    numbers = count()
    with ThreadPoolExecutor(TEACHERS) as pool:
        work = [
            pool.submit(teach_until_it_ends, service, key, numbers, acknowledged)
            for _ in range(TEACHERS)
        ]
        _wait_for(acknowledged, enough, work)
        service.stop(signal.SIGKILL)
    return acknowledged


def _wait_for(done: list[tuple[int, str]], enough: int, work: list[Future[None]]) -> None:
    pause = threading.Event()
    while len(done) < enough:
        assert not any(one.done() for one in work), "a teacher gave up before the kill"
        pause.wait(0.005)


def test_a_kill_loses_no_acknowledged_learner(tmp_path: Path, bundle: Bundle) -> None:
    with ServiceProcess(tmp_path, str(bundle.folder), rates=RATES) as service:
        key = service.key()
        with http(service, key) as web:
            first = web.post("/v1/learners", json={"support": support(seed=10_000)}).json()["id"]
            before = answers(web, [first])
        acknowledged = killed_in_the_middle(service, key, 40)
        service.start()
        with http(service, key) as web:
            assert answers(web, [first]) == before
            for number, name in acknowledged:
                again = web.post("/v1/learners", json={"support": support(seed=number)})
                assert (again.status_code, again.json()["id"]) == (200, name)
                for i in range(4):
                    assert web.get(f"/v1/learners/{name}/examples/{i}").status_code == 200
            kept = web.get("/v1/learners", params={"limit": 200}).json()["learners"]
            _as_if_made_now(web, [one["id"] for one in kept])


def _as_if_made_now(web: httpx.Client, learners: list[str]) -> None:
    """None is half there, acknowledged or not: each answers as its examples alone do."""
    body = {"queries": queries(3)}
    for name in learners:
        told = web.get(f"/v1/learners/{name}").json()
        assert told["examples"] == 4
        asked = web.post(f"/v1/learners/{name}/predict", json=body)
        assert asked.status_code == 200
    first = learners[0]
    pictures = [web.get(f"/v1/learners/{first}/examples/{i}").content for i in range(4)]
    files = [(f"support[class {i % 2}]", ("a.png", one)) for i, one in enumerate(pictures)]
    made = web.post("/v1/learners", files=files)
    assert (made.status_code, made.json()["id"]) == (200, first)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path: Path, bundle: Bundle) -> None:
    everything: set[str] = set()
    with ServiceProcess(tmp_path, str(bundle.folder), rates=RATES) as service:
        key = service.key()
        for kill in range(20):
            everything |= {name for _, name in killed_in_the_middle(service, key, 1 + kill * 2)}
            service.start()
            with http(service, key) as web:
                answers(web, sorted(everything))


def test_a_restart_keeps_learners_and_their_bits(tmp_path: Path, bundle: Bundle) -> None:
    with ServiceProcess(tmp_path, str(bundle.folder)) as service:
        key = service.key()
        with http(service, key) as web:
            made = [web.post("/v1/learners", json={"support": support(seed=i)}) for i in range(5)]
            names = [one.json()["id"] for one in made]
            before = answers(web, names), web.get("/v1/learners").text
            export = web.get(f"/v1/learners/{names[0]}/export").content
        assert service.stop() == 0
        service.start()
        with http(service, key) as web:
            assert (answers(web, names), web.get("/v1/learners").text) == before
            assert web.get(f"/v1/learners/{names[0]}/export").content == export


def test_a_stop_under_load_fails_no_request_in_work(tmp_path: Path, bundle: Bundle) -> None:
    """/readyz says no first; who heeds it and stops asking then loses nothing."""
    service = ServiceProcess(tmp_path, str(bundle.folder), rates=RATES, drain_seconds=1.0)
    with service:
        key, told, done = service.key(), threading.Event(), list[int]()

        def ask(web: httpx.Client) -> list[str]:
            body, failed = {"support": support(), "queries": queries(5)}, []
            while not told.is_set():
                answer = web.post("/v1/predict", json=body)
                done.append(answer.status_code)
                if answer.status_code != 200:
                    failed.append(answer.text)
            return failed

        with ThreadPoolExecutor(TEACHERS) as pool, http(service, key) as web:
            work = [pool.submit(ask, web) for _ in range(TEACHERS)]
            while len(done) < 3 * TEACHERS:
                assert not any(one.done() for one in work)
                threading.Event().wait(0.005)
            assert service.process is not None
            service.process.send_signal(signal.SIGTERM)
            status, body = service.readiness()
            while status == 200:  # until the signal has reached it
                status, body = service.readiness()
            assert (status, body["status"]) == (503, "draining")
            told.set()
            assert [one.result() for one in work] == [[]] * TEACHERS
        assert set(done) == {200}
        assert service.process.wait(30) == 0
        assert "Traceback" not in service.log.read_text()


def test_a_request_that_is_begun_is_answered_though_the_service_stops(
    tmp_path: Path, bundle: Bundle
) -> None:
    """Without any time to drain: its body comes after the signal."""
    with ServiceProcess(tmp_path, str(bundle.folder)) as service:
        key = service.key()
        body = httpx.Request("POST", "/", json={"support": support(), "queries": queries()}).read()
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        with connection(service) as one:
            length = f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
            one.sendall((head + length).encode())
            assert answer_on(one).status == 100, "it is in work"
            assert service.process is not None
            service.process.send_signal(signal.SIGTERM)
            while service.readiness()[0] != 0:  # until nobody listens any more
                pass
            one.sendall(body)
            assert answer_on(one).status == 200
        assert service.process.wait(30) == 0


def test_a_client_who_never_ends_does_not_hold_up_the_stop(tmp_path: Path, bundle: Bundle) -> None:
    rates = {**RATES, "body_seconds": 2.0}
    with ServiceProcess(tmp_path, str(bundle.folder), rates=rates) as service:
        key = service.key()
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        with connection(service) as one, connection(service) as silent:
            one.sendall(f"{head}Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode())
            assert answer_on(one).status == 100
            silent.sendall(b"GET /v1/model HTTP/1.1\r\n")
            assert service.stop() == 0
        assert "Traceback" not in service.log.read_text()


def test_a_deletion_in_the_middle_of_anything_is_no_fault(tmp_path: Path, bundle: Bundle) -> None:
    """The same learner is made, asked, extended, exported and deleted at the same time."""
    with ServiceProcess(tmp_path, str(bundle.folder), rates=RATES) as service:
        key = service.key()
        with http(service, key) as web:
            name = web.post("/v1/learners", json={"support": support()}).json()["id"]

            def often(method: str, path: str, body: object) -> set[int]:
                return {web.request(method, path, json=body).status_code for _ in range(40)}

            path = f"/v1/learners/{name}"
            jobs = [
                ("POST", "/v1/learners", {"support": support()}),
                ("DELETE", path, None),
                ("DELETE", path, None),
                ("GET", path, None),
                ("POST", f"{path}/predict", {"queries": queries()}),
                ("POST", f"{path}/examples", {"support": support(seed=7)}),
                ("GET", f"{path}/export", None),
            ]
            with ThreadPoolExecutor(len(jobs)) as pool:
                found = set().union(*pool.map(lambda job: often(*job), jobs))
            assert found <= {200, 201, 204, 404}, found
            web.delete(path)
            is_problem(web.get(path), 404)
        assert not service.events("fault")
