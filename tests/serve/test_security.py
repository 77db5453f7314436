"""Who is let in, what is too much, and what is never told (S2-S5, D4)."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from PIL import Image

from pipeline.deploy.serve.keys import Keys
from pipeline.deploy.serve.learners import open_database
from pipeline.deploy.serve.settings import Limits
from tests.serve.asking import (
    answer_on,
    connection,
    example,
    http,
    is_closed,
    is_problem,
    png,
    queries,
    raw,
    support,
    vectors,
)
from tests.serve.service_process import ServiceProcess, wait_until
from tests.unit.tiny_learner import tiny_bundle

BODY_BYTES = 200_000
LIMITS = {
    "body_bytes": BODY_BYTES,
    "ways": 4,
    "shots": 3,
    "queries": 5,
    "pixels_together": 3_000_000,
}
PATIENT = {"requests_per_second": 1000.0, "burst": 10_000, "body_seconds": 2.0}
LEARNER = "lrn_" + "0" * 32


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """With small limits, so that they are soon reached."""
    folder = tmp_path_factory.mktemp("security")
    bundle = tiny_bundle(folder)
    one = ServiceProcess(folder / "service", str(bundle.folder), limits=LIMITS, rates=PATIENT)
    with one:
        yield one


@pytest.fixture(scope="module")
def key(service: ServiceProcess) -> str:
    return service.key()


@pytest.fixture(scope="module")
def web(service: ServiceProcess, key: str) -> Iterator[httpx.Client]:
    with http(service, key) as one:
        yield one


@pytest.fixture(scope="module")
def learner(web: httpx.Client) -> str:
    return str(web.post("/v1/learners", json={"support": support()}).json()["id"])


def routes(service: ServiceProcess) -> list[tuple[str, str]]:
    """Every operation behind a key, by OpenAPI."""
    with http(service) as web:
        paths = web.get("/openapi.json").json()["paths"]
    return [(m.upper(), p) for p, of in paths.items() if p.startswith("/v1/") for m in of]


def ask(web: httpx.Client, method: str, path: str, learner: str) -> httpx.Response:
    """The operation with a body that it takes."""
    bodies: dict[tuple[str, str], dict[str, Any]] = {
        ("POST", "/v1/learners"): {"support": support(seed=3)},
        ("POST", "/v1/learners/{id}/examples"): {"support": [example(8, "class 0")]},
        ("POST", "/v1/learners/{id}/predict"): {"queries": queries()},
        ("POST", "/v1/predict"): {"support": support(), "queries": queries()},
    }
    target = path.replace("{id}", learner).replace("{number}", "0").replace("{key}", "0" * 12)
    return web.request(method, target, json=bodies.get((method, path)))


# --- keys -------------------------------------------------------------------------------------


def wrong_keys(service: ServiceProcess) -> dict[str, str | None]:
    keys = Keys(open_database(service.database))
    good, ended, revoked = (keys.make("tester", ["read", "write", "admin"]) for _ in range(3))
    ended = keys.make("tester", ["read", "write", "admin"], days=-1)
    keys.revoke(revoked.split("_")[1])
    _, name, secret = good.split("_", 2)
    other = "A" if secret[-1] != "A" else "B"
    return {
        "none": None,
        "empty": "Bearer",
        "no kind": good,
        "basic": "Basic " + base64.b64encode(good.encode()).decode(),
        "no form": "Bearer abc",
        "not ascii": "Bearer ml_é_é",
        "two spaces": f"Bearer  {good}",
        "id alone": f"Bearer ml_{name}_",
        "wrong secret": f"Bearer ml_{name}_{secret[:-1]}{other}",
        "short secret": f"Bearer ml_{name}_{secret[:-1]}",
        "long secret": f"Bearer {good}A",
        "other id": f"Bearer ml_{'0' * 12}_{secret}",
        "sql": f"Bearer ml_' OR '1'='1_{secret}",
        "huge": "Bearer ml_" + "x" * 20_000 + "_y",
        "hash for secret": f"Bearer ml_{name}_{_hash_in(service, name)}",
        "expired": f"Bearer {ended}",
        "revoked": f"Bearer {revoked}",
    }


def _hash_in(service: ServiceProcess, name: str) -> str:
    with open_database(service.database).connect() as connection:
        query = sa.text("SELECT hash FROM keys WHERE id = :name")
        return str(connection.execute(query, {"name": name}).scalar_one())


def test_no_route_answers_without_a_good_key(service: ServiceProcess, learner: str) -> None:
    wrong = wrong_keys(service)
    details = set()
    with http(service) as web:
        for (method, path), (name, value) in itertools.product(routes(service), wrong.items()):
            sent = {} if value is None else {b"authorization": value.encode()}
            web.headers = httpx.Headers(sent)
            answer = ask(web, method, path, learner)
            details.add(is_problem(answer, 401))
            assert answer.headers["www-authenticate"] == "Bearer", (method, path, name)
    assert len(details) == 1, "what is wrong with a key is not told"


def test_anothers_learner_is_as_if_it_were_not_there(service: ServiceProcess, learner: str) -> None:
    with http(service, service.key(owner="another")) as web:
        for method, path in routes(service):
            if "{id}" in path:
                theirs, nobodys = (ask(web, method, path, name) for name in (learner, LEARNER))
                told = is_problem(theirs, 404).replace(learner, LEARNER)
                assert told == is_problem(nobodys, 404), (method, path)
        assert web.get("/v1/learners").json()["learners"] == []
        is_problem(web.get("/v1/learners", params={"after": learner}), 404)
    with http(service, service.key()) as web:
        assert web.get(f"/v1/learners/{learner}").status_code == 200


@pytest.mark.parametrize("scope", ["read", "write", "admin"])
def test_a_key_does_what_its_scopes_say(scope: str, service: ServiceProcess, learner: str) -> None:
    with http(service, service.key(scopes=[scope])) as web:
        for method, path in routes(service):
            makes = method == "DELETE" or path in ("/v1/learners", "/v1/learners/{id}/examples")
            needs = "write" if makes and method != "GET" else "read"
            needs = "admin" if path.startswith("/v1/keys") else needs
            answer = ask(web, method, path, LEARNER if method == "DELETE" else learner)
            if needs == scope:
                assert answer.status_code in (200, 201, 404), (method, path, answer.text)
            else:
                assert f"may not {needs}" in is_problem(answer, 403), (method, path)


def test_an_admin_sees_all_keys_and_takes_them_back(service: ServiceProcess) -> None:
    lost = service.key(owner="careless", scopes=["read"])
    name, secret = lost.split("_", 2)[1:]
    with http(service, service.key(scopes=["admin"])) as web, http(service, lost) as finder:
        assert finder.get("/v1/model").status_code == 200
        keys = web.get("/v1/keys")
        (told,) = [one for one in keys.json() if one["id"] == name]
        assert (told["owner"], told["scopes"], told["revoked"]) == ("careless", "read", None)
        assert secret not in keys.text and _hash_in(service, name) not in keys.text
        assert web.delete(f"/v1/keys/{name}").status_code == 204
        wait_until(lambda: finder.get("/v1/model").status_code == 401)
        assert "there is no key" in is_problem(web.delete(f"/v1/keys/{'0' * 12}"), 404)


def test_a_refused_body_is_not_read(service: ServiceProcess) -> None:
    """Nobody without a key makes the service take in megabytes."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
    assert raw(service, head).status == 401


def test_the_log_and_the_metrics_hold_no_secret(service: ServiceProcess, learner: str) -> None:
    """Nor pictures, labels, names, learners; not even of requests that fail."""
    key = service.key(owner="owner-of-secrets")
    label, content = "a-label-nobody-may-see", png(4242)
    with http(service, key) as web:
        wanted = [*support(), {"image": base64.b64encode(content).decode(), "label": label}]
        made = web.post("/v1/learners", json={"support": wanted, "name": "a-name-nobody-sees"})
        assert made.status_code == 201
        web.get("/v1/learners/" + label)
        web.get("/" + key)
        web.get(f"/v1/model?key={key}")
        web.post("/v1/predict", json={"support": wanted, "queries": [{"image": label}]})
        web.post("/v1/predict", json={label: label})
        web.post("/v1/predict", content=b"\xff" + label.encode())
        web.request(key, "/v1/model")
        metrics = web.get("/metrics").text
    log = service.log.read_text()
    encoded = base64.b64encode(content).decode()
    for secret in (key, key.split("_", 2)[2], label, "a-name-nobody", encoded[40:80], str(content)):
        assert secret not in log and secret not in metrics
    assert made.json()["id"] not in log and "owner-of-secrets" not in log
    assert not re.findall(r"ml_[0-9a-f]{12}_", log + metrics)


def test_the_database_holds_no_secret(service: ServiceProcess, key: str) -> None:
    _, name, secret = key.split("_", 2)
    with open_database(service.database).connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM keys WHERE id = :i"), {"i": name}).all()
    assert len(rows) == 1 and secret not in repr(rows)


def test_a_database_that_fails_is_a_503_and_the_log_keeps_silent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """SQLAlchemy's own words would hold the picture and the hash of the key."""
    folder = tmp_path_factory.mktemp("broken")
    with ServiceProcess(folder / "service", str(tiny_bundle(folder).folder)) as service:
        engine = open_database(service.database)
        with http(service, service.key()) as web:
            kept = web.post("/v1/learners", json={"support": support()}).json()["id"]
            with engine.begin() as connection:
                connection.execute(sa.text("ALTER TABLE examples RENAME TO elsewhere"))
            answer = web.post("/v1/learners", json={"support": support(seed=5)})
            is_problem(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
            with engine.begin() as connection:
                connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO examples"))
                connection.execute(sa.text("ALTER TABLE keys RENAME TO nokeys"))
            assert web.get("/healthz").status_code == 200
        with http(service, "ml_000000000000_x") as stranger:
            answer = stranger.get("/v1/model")
            is_problem(answer, 503)
            _assert_secured(answer)
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE nokeys RENAME TO keys"))
        with http(service, service.key()) as web:
            again = web.post("/v1/learners", json={"support": support(seed=5)})
            assert again.status_code == 201
            assert web.get(f"/v1/learners/{kept}").status_code == 200
        log = service.log.read_text()
        assert "Traceback" not in log and "class 0" not in log and "PNG" not in log
        assert len(service.events("away")) == 2


# --- paths and headers ------------------------------------------------------------------------

TRICKS = [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/static/..%5capp.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "/static/%00",
    "/static/app.js%00.png",
    "/static/" + "a" * 5000,
    "/static/" + "../" * 40 + "etc/passwd",
    "/static/.",
    "/static/",
    "/static",
    "//v1/learners",
    "/v1//learners",
    "/v1/../v1/learners/x",
    "/V1/learners",
    "/v1%2flearners%2fx",
    "/%76%31/learners/x",
    "/v1/learners/%2e%2e/model",
    "/v1/learners/..",
    "/v1/learners/lrn_%00",
    "/v1/learners/" + LEARNER + "%0a",
    "/v1/learners/" + LEARNER + "/examples/..%2f0",
    "/v1/learners/" + LEARNER + "/examples/0%00",
    "/v1/learners/%ff%fe",
    "/v1;/learners/x",
    "http://elsewhere/v1/learners/x",
    "*",
]


@pytest.mark.parametrize("path", TRICKS)
@pytest.mark.parametrize("with_key", [False, True])
def test_tricks_with_paths_reach_nothing(
    path: str, with_key: bool, service: ServiceProcess, key: str
) -> None:
    line = f"Authorization: Bearer {key}\r\n" if with_key else ""
    for host in ("x", "["):
        text = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{line}\r\n"
        answer = raw(service, text.encode())
        assert answer.status in ((404, 422) if with_key else (401, 404)), answer
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status and "location" not in answer.headers
        for header in SECURITY:
            assert header in answer.headers


SECURITY = (
    "content-security-policy",
    "x-content-type-options",
    "x-frame-options",
    "referrer-policy",
    "cross-origin-opener-policy",
    "cross-origin-resource-policy",
    "x-request-id",
)


def _assert_secured(answer: httpx.Response) -> None:
    for header in SECURITY:
        assert len(answer.headers.get_list(header)) == 1, (header, answer.request.url)
    assert "server" not in answer.headers
    assert not [name for name in answer.headers if name.startswith("access-control")]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


def test_every_answer_has_the_security_headers_and_none_opens_to_other_sites(
    service: ServiceProcess, web: httpx.Client, learner: str
) -> None:
    away = {"origin": "https://elsewhere.example"}
    asked = [ask(web, m, p, learner) for m, p in routes(service) if m != "DELETE"]
    asked += [web.get(path, headers=away) for path in ("/", "/static/app.js", "/healthz")]
    asked += [web.get(path, headers=away) for path in ("/readyz", "/metrics", "/openapi.json")]
    asked += [web.get("/nothing"), web.post("/v1/predict", content=b"{")]
    asked += [web.get("/v1/learners", headers=away), web.put("/v1/learners")]
    preflight = {**away, "access-control-request-method": "POST"}
    asked += [web.options("/v1/learners", headers=preflight), web.options("/", headers=preflight)]
    with http(service) as nobody:
        asked += [nobody.get("/v1/model"), nobody.options("/v1/model", headers=preflight)]
    for answer in asked:
        _assert_secured(answer)
    for path in ("/docs", "/redoc"):
        is_problem(web.get(path), 404)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "HEAD", "BREW"])
def test_other_methods_are_refused_and_told_what_is_allowed(method: str, web: httpx.Client) -> None:
    answer = web.request(method, "/v1/predict")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"


def test_an_ask_to_upgrade_is_no_way_around(service: ServiceProcess) -> None:
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    text = f"GET /v1/model HTTP/1.1\r\nHost: x\r\n{upgrade}Sec-WebSocket-Key: AAAA\r\n\r\n"
    assert raw(service, text.encode()).status == 401


# --- how much ---------------------------------------------------------------------------------


def padded(size: int) -> bytes:
    """An episode of exactly so many bytes."""
    body = json.dumps({"support": support(), "queries": queries()}).encode()
    return body + b" " * (size - len(body))


def chunked(body: bytes, size: int = 4096) -> Iterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize(("more", "status"), [(-1, 200), (0, 200), (1, 413)])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_body_has_so_many_bytes(
    more: int, status: int, in_chunks: bool, service: ServiceProcess, key: str
) -> None:
    body = padded(BODY_BYTES + more)
    with http(service, key) as web:
        answer = web.post("/v1/predict", content=chunked(body) if in_chunks else body)
    assert answer.status_code == status
    if status == 413:
        assert f"{BODY_BYTES:,}" in is_problem(answer, 413)


def test_lengths_that_are_lies_do_no_harm(service: ServiceProcess, key: str) -> None:
    body = padded(2000)

    def told(*lines: str) -> int:
        head = ["POST /v1/predict HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *lines]
        return raw(service, "\r\n".join(head).encode() + b"\r\n\r\n" + body).status

    assert told(f"Content-Length: {len(body)}") == 200
    assert told("Content-Length: 1000") == 400, "the rest is no request"
    assert told(f"Content-Length: {BODY_BYTES + 1}") == 413, "by its own word, unread"
    assert told(f"Content-Length: {10**30}") in (400, 413)
    for wrong in ("-1", "x", "1_0", "0x10", "+5", "１", "", "5, 6"):
        assert told(f"Content-Length: {wrong}") == 400
    assert told("Content-Length: 5", "Content-Length: 6") == 400
    assert told(f"Content-Length: {len(body)}", "Transfer-Encoding: chunked") in (400, 408)
    assert told("Transfer-Encoding: gzip") in (400, 501)
    assert told(f"Content-Length: {len(body)}", "Transfer-Encoding: identity") in (200, 400, 501)
    assert told() == 400, "no body at all"
    assert told(f"Content-Length: {len(body) + 1}") == 408, "one byte is missing"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip", "GZIP"])
def test_compressed_bodies_are_not_taken(encoding: str, web: httpx.Client) -> None:
    body = gzip.compress(json.dumps({"support": support(), "queries": queries()}).encode())
    answer = web.post("/v1/predict", content=body, headers={"content-encoding": encoding})
    assert "compressed" in is_problem(answer, 415)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-pickle", "application/jsonx", "x"])
def test_other_kinds_of_bodies_are_not_taken(kind: str, web: httpx.Client) -> None:
    answer = web.post("/v1/predict", content=padded(2000), headers={"content-type": kind})
    is_problem(answer, 415)


def test_a_body_without_a_kind_is_json(web: httpx.Client) -> None:
    assert web.post("/v1/predict", content=padded(2000)).status_code == 200


@pytest.mark.parametrize(
    ("ways", "shots", "asked", "status"),
    [
        (1, 1, 1, 422),
        (2, 1, 1, 200),
        (3, 1, 1, 200),
        (4, 1, 1, 200),
        (5, 1, 1, 422),
        (2, 2, 1, 200),
        (2, 3, 1, 200),
        (2, 4, 1, 422),
        (4, 3, 5, 200),
        (2, 1, 0, 422),
        (2, 1, 4, 200),
        (2, 1, 5, 200),
        (2, 1, 6, 422),
    ],
)
@pytest.mark.parametrize("as_form", [False, True])
def test_classes_examples_and_queries_have_limits(
    ways: int, shots: int, asked: int, status: int, as_form: bool, web: httpx.Client
) -> None:
    if as_form:
        files = [(f"support[{i % ways}]", ("a.png", png(i))) for i in range(ways * shots)]
        files += [("query", ("q.png", png(i))) for i in range(asked)]
        answer = web.post("/v1/predict", files=files)
    else:
        body = {"support": support(ways, shots), "queries": queries(asked)}
        answer = web.post("/v1/predict", json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        is_problem(answer, status)


def test_an_extension_is_held_to_the_limits_of_the_whole(web: httpx.Client) -> None:
    made = web.post("/v1/learners", json={"support": support(4, 3)}).json()["id"]
    for label, says in (("class 0", "4 examples of one class"), ("new", "5 different labels")):
        body = {"support": [example(99, label)]}
        assert says in is_problem(web.post(f"/v1/learners/{made}/examples", json=body), 422)


def test_a_form_of_too_many_parts_is_refused(web: httpx.Client) -> None:
    files = [("query", ("q.png", b"x"))] * (4 * 3 + 5 + 1)
    is_problem(web.post("/v1/predict", files=files), 400)
    fields = b"".join(
        b'--X\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n' for _ in range(4)
    )
    kind = {"content-type": "multipart/form-data; boundary=X"}
    is_problem(web.post("/v1/learners", content=fields + b"--X--\r\n", headers=kind), 400)


def part(name: str, content: bytes) -> bytes:
    head = f'--X\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"garbage", "multipart/form-data; boundary=X"),
        (b"--X\r\n\r\nabc\r\n--X--\r\n", "multipart/form-data; boundary=X"),
        (b"--X\r\n:::\r\n\r\nabc\r\n--X--\r\n", "multipart/form-data; boundary=X"),
        (b"--X\r\n" + b"A" * 100_000 + b": x\r\n\r\n", "multipart/form-data; boundary=X"),
        (b"--" + b"Y" * 5000 + b"\r\n", "multipart/form-data; boundary=" + "Y" * 5000),
        (part("name", b"x") + b"--X--\r\n", "multipart/form-data; boundary=X; charset=undefined"),
        (part("name", b"x") + b"--X--\r\n", "multipart/form-data; boundary=X; charset=rot13"),
        (part("name", b"x") + b"--X--\r\n", "multipart/form-data; boundary=X; charset=a/../b"),
        (part("name", rb"\ud800") + b"--X--\r\n", "multipart/form-data; boundary=X; charset=utf-7"),
        (part("name", b"\xed\xa0\x80") + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("options", b"[" * 100_000) + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("options", b"NaN") + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("support[a]", b"no file") + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("support[]", b"x") + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("other", b"x") + b"--X--\r\n", "multipart/form-data; boundary=X"),
        (part("name", b"cut short"), "multipart/form-data; boundary=X"),
    ],
)
def test_odd_forms_are_refused(body: bytes, kind: str, web: httpx.Client) -> None:
    answer = web.post("/v1/learners", content=body, headers={"content-type": kind})
    assert answer.status_code in (400, 422)
    is_problem(answer, answer.status_code)


DEEP = b"[" * 90_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        DEEP,
        b'{"a":' * 20_000,
        b'{"support": ' + DEEP + b"]" * 90_000 + b"}",
        b"\xff\xfe{\x00}\x00",
        b'\xef\xbb\xbf{"support": []}',
        b'{"support": [{"label": "\\ud800", "image": "AA=="}], "queries": []}',
        b'{"support": [{"label": "\xed\xa0\x80", "image": "AA=="}], "queries": []}',
        b'{"support": [{"label": 1' + b"0" * 5000 + b', "image": "AA=="}], "queries": []}',
        b'{"' + b"k" * 100_000 + b'": 1}',
        b"{}" * 10,
        b"{} {}",
        b"{'support': 1}",
        b'{"__class__": "os.system", "__reduce__": [1]}',
    ],
)
def test_odd_json_is_refused(body: bytes, web: httpx.Client) -> None:
    answer = web.post("/v1/predict", content=body)
    assert answer.status_code in (400, 422)
    is_problem(answer, answer.status_code)
    assert len(answer.content) < 2000, "what was sent does not come back"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308"])
def test_values_that_are_no_numbers_are_refused(value: str, web: httpx.Client) -> None:
    body = json.dumps({"support": support(), "queries": vectors(1, 0.5)}).replace("0.5", value, 1)
    answer = web.post("/v1/predict", content=body)
    assert answer.status_code in (400, 422)
    is_problem(answer, answer.status_code)


def test_of_a_key_twice_the_last_one_counts_and_both_are_checked(web: httpx.Client) -> None:
    """As RFC 8259 expects of most readers; a label cannot be smuggled past its check."""
    twice = json.dumps({"support": support(), "queries": queries()})
    assert web.post("/v1/predict", content='{"against": 1, ' + twice[1:]).status_code == 422
    smuggled = twice.replace('"label": "class 0"', '"label": "class 0", "label": []', 1)
    is_problem(web.post("/v1/predict", content=smuggled), 422)


# --- pictures ---------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def hollow(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def flat_png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG", optimize=True)
    return file.getvalue()


def with_query(content: bytes) -> dict[str, Any]:
    return {"support": support(), "queries": [{"image": base64.b64encode(content).decode()}]}


DEFAULT = Limits()


@pytest.mark.parametrize(
    ("width", "height", "status"),
    [
        (4095, 900, 200),
        (4096, 900, 200),
        (4097, 900, 422),
        (900, 4097, 422),
        (1999, 2001, 200),
        (2000, 2000, 200),
        (2001, 2000, 422),
    ],
)
def test_pictures_have_limits(width: int, height: int, status: int, web: httpx.Client) -> None:
    assert (DEFAULT.side, DEFAULT.pixels) == (4096, 4_000_000)
    answer = web.post("/v1/predict", json=with_query(flat_png(width, height)))
    assert answer.status_code == status
    if status == 422:
        assert "queries[0]" in is_problem(answer, 422)


@pytest.mark.parametrize(("count", "status"), [(3, 200), (4, 422)])
def test_all_pictures_of_a_request_have_a_limit_together(
    count: int, status: int, web: httpx.Client
) -> None:
    """A hundred of the largest in one colour would fit into two megabytes, and take ten seconds."""
    side = 1000
    large = base64.b64encode(flat_png(side, side)).decode()
    body = {"support": support(), "queries": [{"image": large}] * count}
    answer = web.post("/v1/predict", json=body)
    assert answer.status_code == status
    if status == 422:
        assert "queries: 4.0 million pixels together" in is_problem(answer, 422)


def _text_bomb() -> bytes:
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    good = flat_png(12, 12)
    return good[:33] + chunk(b"zTXt", bomb) + good[33:]


def _profile_bomb() -> bytes:
    bomb = b"icc\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    good = flat_png(12, 12)
    return good[:33] + chunk(b"iCCP", bomb) + good[33:]


def _saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 12)).save(file, kind)
    return file.getvalue()


def _animated() -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("L", (12, 12), shade) for shade in (0, 100, 200)]
    pictures[0].save(file, "PNG", save_all=True, append_images=pictures[1:])
    return file.getvalue()


HOSTILE = {
    "of 2^31 pixels a side": hollow(2**31 - 1, 2**31 - 1),
    "of 65,535 pixels a side": hollow(65535, 65535),
    "of no pixels": hollow(0, 10),
    "that claims more than it holds": hollow(2000, 2000),
    "cut short": flat_png(12, 12)[:-20],
    "without an end": flat_png(12, 12)[:-12],
    "animated": _animated(),
    "a GIF": _saved("GIF"),
    "a BMP": _saved("BMP"),
    "a TIFF": _saved("TIFF"),
    "a WebP": _saved("WEBP"),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "a script": b"#!/bin/sh\necho hello\n",
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
    "a gzip of a picture": gzip.compress(flat_png(12, 12)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused(name: str, web: httpx.Client) -> None:
    answer = web.post("/v1/predict", json=with_query(HOSTILE[name]))
    assert "queries[0]" in is_problem(answer, 422)


@pytest.mark.parametrize("make", [_text_bomb, _profile_bomb])
def test_bombs_in_a_pictures_notes_do_no_harm(make: Any, web: httpx.Client) -> None:
    assert web.post("/v1/predict", json=with_query(make())).status_code in (200, 422)


# --- how fast ---------------------------------------------------------------------------------


def test_a_key_has_a_rate_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rates")
    rates = {"requests_per_second": 0.5, "burst": 5, "concurrent": 2, "body_seconds": 20.0}
    model = str(tiny_bundle(folder).folder)
    with ServiceProcess(folder / "service", model, rates=rates) as service:
        one, two = service.key(), service.key()
        with http(service, one) as web:
            answers = [web.get("/v1/learners") for _ in range(8)]
            assert [answer.status_code for answer in answers[:5]] == [200] * 5
            over = [answer for answer in answers if answer.status_code == 429]
            assert len(over) >= 2
            for answer in over:
                assert "Slow down" in is_problem(answer, 429)
                assert int(answer.headers["retry-after"]) in (1, 2)
            assert web.get("/healthz").status_code == 200, "health has no limit"
        with http(service, two) as web:
            assert web.get("/v1/learners").status_code == 200, "another's key is not held up"
        _only_two_at_once(service, service.key())


def _only_two_at_once(service: ServiceProcess, key: str) -> None:
    """Two requests that are not whole yet are in work; a third one has to wait."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    with connection(service) as first, connection(service) as second:
        for one in (first, second):
            one.sendall(f"{head}Content-Length: 2\r\nExpect: 100-continue\r\n\r\n".encode())
            assert answer_on(one).status == 100, "it is in work"
        third = raw(service, f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        assert third.status == 429 and int(third.headers["retry-after"]) >= 1
        first.sendall(b"{}")
        assert answer_on(first).status == 422
        again = raw(service, f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        assert again.status == 422, "the place is free again"


def test_slow_clients_are_cut_and_others_served(service: ServiceProcess, key: str) -> None:
    """Heads that never end, bodies that never end, and bodies of requests long answered."""
    begun = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    slow = {
        "says nothing": b"",
        "head": b"GET /v1/model HTTP/1.1\r\nX-Slow: ",
        "body": f"{begun}Content-Length: 1000\r\n\r\n{{".encode(),
        "chunks": f"{begun}Transfer-Encoding: chunked\r\n\r\n5\r\n".encode(),
        "a body that nobody waits for": b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
        b"Content-Length: 100000\r\n\r\n{",
        "a body for health": b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{",
    }
    kinds = [name for name in slow for _ in range(10)]
    with ThreadPoolExecutor(len(kinds)) as pool:
        held = [pool.submit(_dripped, service, slow[name]) for name in kinds]
        with http(service, key) as web:
            for _ in range(20):
                assert web.get("/v1/learners").status_code == 200
        for name, one in zip(kinds, held, strict=True):
            status = one.result(timeout=60)
            expected = {"body": 408, "chunks": 408, "a body for health": 200}
            wanted = 401 if "nobody waits" in name else expected.get(name, 0)
            assert status == wanted, name


def _dripped(service: ServiceProcess, content: bytes) -> int:
    """The answer, or 0, to a client that sends a byte each half second until it is cut."""
    with connection(service) as one:
        one.sendall(content)
        one.settimeout(0.5)
        found = b""
        for _ in range(80):
            try:
                part = one.recv(65536)
                if not part:
                    break
                found += part
            except TimeoutError:
                pass
            except ConnectionResetError:
                break
            try:
                one.sendall(b"1")
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            raise AssertionError("the connection is still held")
    return int(found.split()[1]) if found else 0


def test_connections_are_given_back(service: ServiceProcess, key: str) -> None:
    """Of clients who left in the middle, in any state."""
    begun = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    body = padded(2000)
    whole = f"{begun}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for length in range(0, len(whole), 37):
        with connection(service) as one:
            one.sendall(whole[:length])
    with connection(service) as one:
        one.sendall(whole + whole[:10])
        assert answer_on(one).status == 200
        one.shutdown(1)
        assert is_closed(one)
    with http(service, key) as web:
        assert web.post("/v1/predict", content=body).status_code == 200
    assert _sockets(service) <= 8


def _sockets(service: ServiceProcess) -> int:
    """Connections that the process still holds open, by its file descriptors."""
    from pathlib import Path

    assert service.process is not None
    names = Path(f"/proc/{service.process.pid}/fd").iterdir()
    return sum("socket" in str(name.readlink()) for name in names if name.is_symlink())


def test_nothing_above_was_a_fault(service: ServiceProcess) -> None:
    """After all that: no traceback, no answer of 500, and still ready."""
    log = service.log.read_text()
    assert "Traceback" not in log and not service.events("fault")
    assert not [one for one in service.events("request") if one["status"] == "500"]
    assert service.readiness()[0] == 200
