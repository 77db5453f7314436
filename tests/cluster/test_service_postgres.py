"""The service with its learners in PostgreSQL, where several replicas share them."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from infra.local.servers import Server
from tests.serve.asking import http, is_problem, queries, support
from tests.serve.service_process import ServiceProcess
from tests.serve.test_api import LABELS, live
from tests.unit.tiny_learner import base64_png, picture, tiny_bundle


@pytest.fixture(scope="module")
def address(postgres: Server) -> str:
    """As SQLAlchemy wants it."""
    return postgres.environment["METALOOM_POSTGRES_URL"].replace("://", "+psycopg2://", 1)


@pytest.fixture(scope="module")
def replicas(
    address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, ServiceProcess]]:
    folder = tmp_path_factory.mktemp("replicas")
    model = str(tiny_bundle(folder).folder)
    first, second = (ServiceProcess(folder / n, model, database=address) for n in "ab")
    with first, second:
        yield first, second


def test_the_life_of_a_learner(replicas: tuple[ServiceProcess, ServiceProcess]) -> None:
    with replicas[0].client(replicas[0].key(owner="of the life")) as client:
        live(client)


def test_odd_labels_and_names_are_kept(replicas: tuple[ServiceProcess, ServiceProcess]) -> None:
    wanted = [{"image": base64_png(picture(i)), "label": one} for i, one in enumerate(LABELS)]
    with http(replicas[0], replicas[0].key(owner="odd")) as web:
        made = web.post("/v1/learners", json={"support": wanted, "name": "Ü 猫 '; DROP TABLE keys"})
        assert made.status_code == 201
        assert [one["label"] for one in made.json()["classes"]] == LABELS
        assert web.get("/v1/learners").json()["learners"] == [made.json()]
        is_problem(web.post("/v1/learners", json={"support": wanted, "name": "a\0b"}), 422)


def test_replicas_share_learners_and_answer_with_the_same_bits(
    replicas: tuple[ServiceProcess, ServiceProcess],
) -> None:
    key = replicas[0].key(owner="of both")
    with http(replicas[0], key) as one, http(replicas[1], key) as two:
        made = one.post("/v1/learners", json={"support": support()})
        again = two.post("/v1/learners", json={"support": support()})
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.json() == again.json()
        path = f"/v1/learners/{made.json()['id']}"
        texts = {
            web.post(f"{path}/predict", json={"queries": queries(5)}).text for web in (one, two)
        }
        assert len(texts) == 1
        exports = {web.get(f"{path}/export").content for web in (one, two)}
        assert len(exports) == 1
        assert two.delete(path).status_code == 204
        is_problem(two.get(path), 404)


def test_a_database_that_goes_away_is_a_503_until_it_is_back(
    replicas: tuple[ServiceProcess, ServiceProcess], postgres: Server
) -> None:
    """The process lives on, and nobody restarts it."""
    service = replicas[0]
    with http(service, service.key(owner="patient")) as web:
        made = web.post("/v1/learners", json={"support": support()}).json()["id"]
        postgres.stop()
        try:
            answer = web.post("/v1/learners", json={"support": support(seed=1)})
            assert "retry-after" in answer.headers
            is_problem(answer, 503)
            assert web.get("/healthz").status_code == 200
        finally:
            postgres.start()
        assert web.get(f"/v1/learners/{made}").status_code == 200
        assert web.post("/v1/learners", json={"support": support(seed=1)}).status_code == 201
    assert "Traceback" not in service.log.read_text()


def test_a_kill_loses_no_acknowledged_learner(
    replicas: tuple[ServiceProcess, ServiceProcess],
) -> None:
    service = replicas[1]
    key = service.key(owner="of the killed")
    with http(service, key) as web:
        made = [web.post("/v1/learners", json={"support": support(seed=i)}) for i in range(5)]
        names = [one.json()["id"] for one in made]
        service.stop(signal.SIGKILL)
    with http(replicas[0], key) as web:
        assert {one["id"] for one in web.get("/v1/learners").json()["learners"]} == {*names}
    service.start()
    with http(service, key) as web:
        assert [web.get(f"/v1/learners/{one}").status_code for one in names] == [200] * 5
