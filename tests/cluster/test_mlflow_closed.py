"""MLflow without a login: no route gives data or takes a write (GUARANTEES M6).

The routes are read from the application itself, Flask's and FastAPI's, so that a new version's
routes are swept too.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from infra.local import mlflow_server as server_of_mlflow
from infra.local import postgres as server_of_postgres
from infra.local import s3 as server_of_s3
from infra.local.processes import Running, free_ports, http_status, kill, launch, settings
from infra.local.servers import Server

psycopg2 = pytest.importorskip(
    "psycopg2", reason="psycopg2 is not installed (make test-cluster installs it)"
)

PUBLIC = {
    "/health",
    "/api/3.0/mlflow/server-info",
    "/ajax-api/3.0/mlflow/server-info",
    "/static-files/<path:path>",  # the page's own scripts and pictures
}
"""What MLflow answers without a login, on purpose. `test_what_is_public_tells_nothing` reads it."""
EARLIER_DEFAULTS = [("admin", "password"), ("admin", "password1234"), ("admin", ""), ("", "")]
"""Logins that earlier versions shipped, or that a lazy administrator sets."""

ROUTES = """
import json, sys, warnings
warnings.simplefilter("ignore")
from fastapi.routing import APIRoute, APIRouter
import mlflow.server.fastapi_app as module
if sys.argv[1] == "login":
    from mlflow.server.auth import create_app
    app = create_app()
else:
    app = module.app
from mlflow.server import app as flask_app

routers = [value for value in vars(module).values() if isinstance(value, APIRouter)]
hidden = [r.path for router in routers for r in router.routes if not r.include_in_schema]
assert routers and not hidden, hidden
native = [(m.upper(), path) for path, item in app.openapi()["paths"].items() for m in item]
flask = [(m, rule.rule) for rule in flask_app.url_map.iter_rules() for m in rule.methods]
print("ROUTES", json.dumps({"native": native, "flask": flask}))
"""


@dataclass(frozen=True)
class Answer:
    method: str
    path: str
    status: int
    body: bytes


@dataclass(frozen=True)
class Known:
    """Things that are in the server, so that an open route has something to give away."""

    run: str
    experiment: str
    secret: str


def routes(environment: dict[str, str], *, login: bool) -> dict[str, list[tuple[str, str]]]:
    """(method, rule) of every route, of the application that this environment makes."""
    inner = {"_MLFLOW_SGI_NAME": "uvicorn", "_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED": "true"}
    done = subprocess.run(
        [sys.executable, "-c", ROUTES, "login" if login else "open"],
        env={**environment, **inner},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROUTES "))
    found: dict[str, list[list[str]]] = json.loads(line.removeprefix("ROUTES "))
    return {
        kind: sorted({(m, rule) for m, rule in pairs if m != "OPTIONS"})
        for kind, pairs in found.items()
    }


def ask(
    url: str,
    method: str,
    path: str,
    *,
    login: tuple[str, str] | None = None,
    headers: dict[str, str] | None = None,
    body: Any = None,
) -> Answer:
    """One request, sent as it is: nothing normalises the path."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    sent = {"Content-Type": "application/json", **(headers or {})}
    if login is not None:
        sent["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    content = None if method in {"GET", "HEAD"} else json.dumps(body or {})
    try:
        connection.request(method, path, body=content, headers=sent)
        reply = connection.getresponse()
        return Answer(method, path, reply.status, reply.read())
    finally:
        connection.close()


def filled(rule: str, known: Known) -> str:
    """A rule with every placeholder filled, and what the searching routes ask for."""
    path = re.sub(r"<[^>]*>|\{[^}]*\}", known.run, rule)
    return f"{path}?run_id={known.run}&run_uuid={known.run}&experiment_id={known.experiment}&path=note.txt"


def sweep(
    url: str, found: dict[str, list[tuple[str, str]]], known: Known, **how: Any
) -> dict[tuple[str, str], Answer]:
    body = {
        "run_id": known.run,
        "experiment_id": known.experiment,
        "experiment_ids": [known.experiment],
        "name": "intruder",
        "key": "k",
        "value": "1",
    }
    everything = sorted({pair for pairs in found.values() for pair in pairs})
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda pair: ask(url, pair[0], filled(pair[1], known), body=body, **how), everything
        )
        return dict(zip(everything, answers, strict=True))


def open_routes(answers: dict[tuple[str, str], Answer]) -> list[tuple[str, str, int]]:
    """Those that did anything but refuse, apart from the public ones."""
    return [
        (method, rule, answer.status)
        for (method, rule), answer in answers.items()
        if rule not in PUBLIC and answer.status not in {401, 403}
    ]


def fill(url: str, login: tuple[str, str] | None) -> Known:
    """An experiment with a run, a tag and a file."""
    secret = "swordfish-7c1f"

    def post(path: str, body: Any) -> Any:
        answer = ask(url, "POST", f"/api/2.0/mlflow/{path}", login=login, body=body)
        assert answer.status == 200, answer
        return json.loads(answer.body)

    made = post("experiments/create", {"name": f"closed-{os.urandom(4).hex()}"})
    experiment = made["experiment_id"]
    run = post("runs/create", {"experiment_id": experiment})["run"]["info"]["run_id"]
    post("runs/set-tag", {"run_id": run, "key": "secret", "value": secret})
    return Known(run=run, experiment=experiment, secret=secret)


@pytest.fixture(scope="module")
def admin(mlflow_server: Server) -> tuple[str, str]:
    environment = mlflow_server.environment
    return environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]


@pytest.fixture(scope="module")
def known(mlflow_server: Server, admin: tuple[str, str]) -> Known:
    return fill(mlflow_server.record.url, admin)


@pytest.fixture(scope="module")
def found(mlflow_server: Server) -> dict[str, list[tuple[str, str]]]:
    secrets = settings(mlflow_server.folder, dict)
    environment = server_of_mlflow.environment(mlflow_server.cluster, secrets)
    return routes(environment, login=True)


@pytest.fixture(scope="module")
def holdings(postgres: Server, s3: Server) -> Callable[[], dict[str, int]]:
    """Number of rows in every table of MLflow's databases, and of objects below its prefix."""

    def count() -> dict[str, int]:
        held = {}
        secrets = settings(postgres.folder, dict)
        for database in ("mlflow", "mlflow_auth"):
            connection = psycopg2.connect(server_of_postgres.url_of(secrets, database))
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
                for (table,) in cursor.fetchall():
                    cursor.execute(f'SELECT count(*) FROM "{table}"')
                    held[f"{database}.{table}"] = cursor.fetchone()[0]
            connection.close()
        files = server_of_s3.file_system(s3.environment)
        below = fs.FileSelector("metaloom/mlflow", recursive=True, allow_not_found=True)
        return {**held, "objects": len(files.get_file_info(below))}

    return count


def told(answers: dict[tuple[str, str], Answer]) -> str:
    return ", ".join(
        f"{n} x {status}"
        for status, n in sorted(Counter(answer.status for answer in answers.values()).items())
    )


def test_nothing_without_a_login(
    mlflow_server: Server,
    known: Known,
    found: dict[str, list[tuple[str, str]]],
    holdings: Callable[[], dict[str, int]],
    record_property: Callable[[str, object], None],
) -> None:
    """Every method of every route, anonymously: 401 or 403, no secret, no row, no object."""
    before = holdings()
    answers = sweep(mlflow_server.record.url, found, known)
    assert open_routes(answers) == []
    assert not [a for a in answers.values() if known.secret.encode() in a.body]
    assert holdings() == before
    assert found["native"] and found["flask"] and {rule for _, rule in answers} >= PUBLIC
    record_property("swept", len(answers))
    print(f"\nMLflow, anonymous: {len(answers)} (method, route) pairs: {told(answers)}")


@pytest.mark.parametrize("login", EARLIER_DEFAULTS)
def test_no_default_password(
    login: tuple[str, str],
    mlflow_server: Server,
    known: Known,
    found: dict[str, list[tuple[str, str]]],
    holdings: Callable[[], dict[str, int]],
) -> None:
    before = holdings()
    answers = sweep(mlflow_server.record.url, found, known, login=login)
    assert open_routes(answers) == []
    assert holdings() == before
    print(f"\nMLflow, {login}: {len(answers)} (method, route) pairs: {told(answers)}")


def test_no_other_way_in(mlflow_server: Server, known: Known, admin: tuple[str, str]) -> None:
    """Wrong passwords of the right user, other schemes, paths that look public, other hosts."""
    url, (user, password) = mlflow_server.record.url, admin
    search = "/api/2.0/mlflow/runs/get"
    asked = f"{search}?run_id={known.run}"
    assert ask(url, "GET", asked, login=admin).status == 200
    refused = [
        *(ask(url, "GET", asked, login=(user, wrong)) for wrong in ("", password[:-1], "x" * 4096)),
        *(
            ask(url, "GET", asked, headers={"Authorization": value})
            for value in ("Basic", "Basic !!", f"Bearer {password}", f"basic {user}:{password}")
        ),
        *(
            ask(url, "GET", f"{prefix}{asked}")
            for prefix in (
                "/health/..",
                "/static-files/..",
                "/static-files/%2e%2e",
                "/health/%2e%2e",
                "/",
            )
        ),
        ask(url, "GET", asked, headers={"X-Original-URL": "/health", "X-Forwarded-User": user}),
        ask(url, "GET", asked, headers={"X-HTTP-Method-Override": "OPTIONS"}),
    ]
    assert [a for a in refused if a.status not in {401, 403, 404}] == []
    assert not [a for a in refused if known.secret.encode() in a.body]
    foreign = ask(url, "GET", asked, login=admin, headers={"Host": "evil.example"})
    assert foreign.status in {400, 403} and known.secret.encode() not in foreign.body


def test_what_is_public_tells_nothing(
    mlflow_server: Server, postgres: Server, s3: Server, known: Known
) -> None:
    secrets = [settings(server.folder, dict) for server in (mlflow_server, postgres, s3)]
    words = [*re.findall(r'"([^"]{12,})"', json.dumps(secrets)), known.secret, known.run]
    for rule in sorted(PUBLIC):
        body = ask(mlflow_server.record.url, "GET", filled(rule, known)).body.decode(
            errors="replace"
        )
        assert not [word for word in words if word in body], rule


def test_a_user_without_a_permission_sees_nothing(
    mlflow_server: Server, known: Known, admin: tuple[str, str]
) -> None:
    """A login alone is not enough: the default permission is none."""
    url, login = mlflow_server.record.url, (f"guest-{os.urandom(4).hex()}", "guest password 1")
    made = ask(
        url,
        "POST",
        "/api/2.0/mlflow/users/create",
        login=admin,
        body={"username": login[0], "password": login[1]},
    )
    assert made.status == 200, made
    got = ask(url, "GET", f"/api/2.0/mlflow/runs/get?run_id={known.run}", login=login)
    assert got.status == 403
    body = {"experiment_ids": [known.experiment]}
    searched = ask(url, "POST", "/api/2.0/mlflow/runs/search", login=login, body=body)
    assert known.secret.encode() not in searched.body


@pytest.fixture
def open_server(mlflow_server: Server, tmp_path: Path) -> Iterator[tuple[Running, dict[str, str]]]:
    """The same server with the login switched off, on a database of its own."""
    port = free_ports(1)[0]
    secrets = settings(mlflow_server.folder, dict)
    environment = {
        **server_of_mlflow.environment(mlflow_server.cluster, secrets),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/open.db",
        "HOME": str(tmp_path),
    }
    record = Running(
        name="open", folder=str(tmp_path), ports={}, url=f"http://127.0.0.1:{port}", environment={}
    )
    command = server_of_mlflow.command(port, login=False)
    command[command.index("--artifacts-destination") + 1] = str(tmp_path / "artifacts")
    running = launch(
        record,
        command,
        environment=environment,
        answers=lambda: http_status(f"{record.url}/health") == 200,
    )
    yield running, environment
    kill(tmp_path)


def test_the_sweep_finds_an_open_server(
    open_server: tuple[Running, dict[str, str]],
) -> None:
    """Without the login the same sweep reports open routes of both kinds, and reads the secret."""
    running, environment = open_server
    assert asdict(running)["pid"] > 0
    known = fill(running.url, None)
    found = routes(environment, login=False)
    answers = sweep(running.url, found, known)
    opened = {(method, rule) for method, rule, _ in open_routes(answers)}
    flask = {pair for pair in found["flask"] if pair[1] not in PUBLIC}
    assert opened & flask and opened & set(map(tuple, found["native"]))
    assert [a for a in answers.values() if known.secret.encode() in a.body]
    print(f"\nMLflow with its login off: {len(opened)} of {len(answers)} pairs are open")
