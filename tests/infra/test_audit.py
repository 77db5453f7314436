"""The audit: gaps in a bill, known vulnerabilities, waivers, and an advisory service that is away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.advisories import Found, is_affected, read_files
from infra.audit import NOT_AUDITED, RED, bill_gaps, gaps, versions
from infra.images.contents import IMAGES, Image
from infra.images.lock import read_lock
from infra.waivers import read_waivers
from pipeline.core.errors import ConfigError
from pipeline.deploy.smoke import free_port
from tests.conftest import REPOSITORY

EVERY = pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))
LOCKED = versions([IMAGES["serve"]])
TODAY = datetime.now(UTC).date()


@EVERY
def test_every_locked_package_is_in_the_bill_with_hashes_and_a_licence(image: Image) -> None:
    assert gaps(image) == []
    components = json.loads(image.bill.read_text())["components"]
    assert len(components) == len(read_lock(image.lock.read_text())) > 150
    assert all(one["licenses"] and one["hashes"] and one["purl"] for one in components)


def _without(component: dict[str, Any], bill: dict[str, Any]) -> None:
    bill["components"].remove(component)
    for one in bill["dependencies"]:
        one["dependsOn"] = [r for r in one.get("dependsOn", ()) if r != component["bom-ref"]]
    bill["dependencies"] = [d for d in bill["dependencies"] if d["ref"] != component["bom-ref"]]


GAPS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "gone": (_without, "in the lock alone"),
    "no licence": (lambda one, bill: one.pop("licenses"), "no licence"),
    "no hash": (lambda one, bill: one.pop("hashes"), "differ"),
    "other hash": (lambda one, bill: one["hashes"][0].update(content="0" * 64), "differ"),
    "other version": (lambda one, bill: one.update(version="0"), "differ"),
    "other name": (lambda one, bill: one.update(name="numpyy"), "in the bill alone"),
    "no json schema": (lambda one, bill: one.update(type="nonsense"), "schema"),
}


@pytest.mark.parametrize("gap", GAPS)
def test_a_gap_in_the_bill_is_found(gap: str) -> None:
    image = IMAGES["serve"]
    bill = json.loads(image.bill.read_text())
    (component,) = (one for one in bill["components"] if one["name"] == "numpy")
    change, said = GAPS[gap]
    change(component, bill)
    found = bill_gaps(image.name, image.lock.read_text(), json.dumps(bill))
    assert found and any(said in one for one in found), found


REQUESTS = {
    "id": "GHSA-j8r2-6x86-q33q",
    "aliases": ["CVE-2023-32681"],
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "requests"},
            "ranges": [
                {"type": "ECOSYSTEM", "events": [{"introduced": "2.3.0"}, {"fixed": "2.31.0"}]}
            ],
        }
    ],
}
"""As published in 2023: requests sent a proxy's password on to the site behind it."""


@pytest.mark.parametrize(
    ("version", "unsafe"),
    [("2.2.1", False), ("2.3.0", True), ("2.30.0", True), ("2.31.0", False), ("2.34.2", False)],
)
def test_an_advisory_of_a_file_is_found_in_the_versions_that_have_it(
    version: str, unsafe: bool, tmp_path: Path
) -> None:
    (tmp_path / "one.json").write_text(json.dumps(REQUESTS))
    answer = read_files({"Requests": version, "numpy": "2.0"}, tmp_path)
    wanted = Found("Requests", version, REQUESTS["id"], ("CVE-2023-32681",), ("2.31.0",))
    assert answer.found == ((wanted,) if unsafe else ())
    assert not answer.not_audited


@pytest.mark.parametrize(
    ("events", "inside", "outside"),
    [
        ([{"introduced": "0"}, {"last_affected": "1.4"}], ["0.1", "1.4"], ["1.4.1"]),
        ([{"introduced": "0"}], ["0.1", "99"], []),
        (
            [{"introduced": "2.0"}, {"fixed": "2.2"}, {"introduced": "0"}, {"fixed": "1.5"}],
            ["1.4", "2.1"],
            ["1.5", "1.9", "2.2"],
        ),
        ([{"introduced": "1.10"}, {"fixed": "1.12rc1"}], ["1.11"], ["1.9", "1.12rc1", "1.12"]),
    ],
)
def test_ranges_are_read_as_the_schema_says(
    events: list[dict[str, str]], inside: list[str], outside: list[str]
) -> None:
    affected = {"ranges": [{"type": "ECOSYSTEM", "events": events}]}
    assert [is_affected(v, affected) for v in inside] == [True] * len(inside)
    assert [is_affected(v, affected) for v in outside] == [False] * len(outside)
    assert is_affected("7", {"versions": ["7"], "ranges": []})


def planted(package: str, fixed: str, **more: Any) -> dict[str, Any]:
    """An advisory against all versions of a package before one."""
    events = [{"introduced": "0"}, {"fixed": fixed}]
    affected = {
        "package": {"ecosystem": "PyPI", "name": package},
        "ranges": [{"type": "ECOSYSTEM", "events": events}],
    }
    return {
        "id": "GHSA-aaaa-bbbb-cccc",
        "aliases": ["CVE-2026-99999"],
        "affected": [affected],
        **more,
    }


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "infra.audit", "serve", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def waiver(expires: date, package: str = "torch", name: str = "CVE-2026-99999") -> str:
    return (
        f'[["{name}"]]\npackage = "{package}"\nexpires = {expires}\n'
        'reason = "the part of it that is unsafe is never called here"\n'
    )


CASES = {
    "nothing known": (planted("nobody-has-this", "9"), "", 0, "nothing is known"),
    "withdrawn": (planted("torch", "99", withdrawn="2026-01-01T00:00:00Z"), "", 0, "nothing is"),
    "mended before": (planted("torch", LOCKED["torch"].partition("+")[0]), "", 0, "nothing is"),
    "unsafe": (
        planted("torch", "99"),
        "",
        RED,
        r"torch 2\S+: CVE-2026-99999, GHSA\S+; mended in 99",
    ),
    "waived": (planted("torch", "99"), waiver(TODAY), 0, "waived until"),
    "other package": (planted("torch", "99"), waiver(TODAY, "numpy"), RED, "torch 2"),
    "other id": (planted("torch", "99"), waiver(TODAY, name="CVE-2026-11111"), RED, "torch 2"),
    "expired": (planted("torch", "99"), waiver(TODAY - timedelta(1)), RED, "ended on"),
    "expired for nothing": (planted("x", "9"), waiver(TODAY - timedelta(1)), RED, "ended on"),
    "of no use": (planted("x", "9"), waiver(TODAY), 0, "covers nothing"),
    "too long": (planted("x", "9"), waiver(TODAY + timedelta(91)), 1, "more than 90 days"),
    "no reason": (planted("x", "9"), '[["CVE-1"]]\npackage = "a"\n', 1, "cannot be used"),
    "no toml": (planted("x", "9"), "waive everything", 1, "cannot be used"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_audit_from_a_file(case: str, tmp_path: Path) -> None:
    advisory, waivers, status, said = CASES[case]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("GHSA-aaaa-bbbb-cccc.json", json.dumps(advisory))
    (tmp_path / "waivers.toml").write_text(waivers)
    files = "--advisories", str(tmp_path / "all.zip"), "--waivers", str(tmp_path / "waivers.toml")
    ended, text = run(*files)
    assert ended == status, text
    assert re.search(said, text), text


def test_no_advisories_are_no_all_clear(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        status, text = run("--advisories", str(path))
        assert status == 1 and ("holds no advisory" in text or "cannot be read" in text)


def test_our_own_waivers_can_be_read() -> None:
    for one in read_waivers(REPOSITORY / "infra/images/waivers.toml", TODAY):
        assert one.expires >= TODAY, "an expired waiver: `make audit`"


def test_a_short_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(waiver(TODAY).replace("the part of it that is unsafe is never called", "no"))
    with pytest.raises(ConfigError, match="reason"):
        read_waivers(path, TODAY)


@contextmanager
def advisory_service(answer: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """A server that speaks as OSV's query interface does; `answer` None: it knows nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told = answer(asked)
            body = json.dumps(told if told is not None else {}).encode()
            self.send_response(200 if told is not None else 503)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_planted_vulnerable_version_is_found_by_the_service() -> None:
    asked = []

    def answer(question: dict[str, Any]) -> Any:
        asked.append((question["package"]["name"].lower(), question["version"]))
        return {"vulns": [planted("torch", "99")]} if question["package"]["name"] == "torch" else {}

    with advisory_service(answer) as url:
        status, text = run("--service", "osv", "--osv-url", url)
    assert status == RED, text
    assert re.search(r"torch 2\.\d+\.\d+\+cpu: .*CVE-2026-99999", text), text
    assert ("torch", LOCKED["torch"].partition("+")[0]) in asked
    assert len(asked) == len(LOCKED)


def test_a_clean_answer_of_the_service_is_an_all_clear() -> None:
    with advisory_service(lambda question: {}) as url:
        status, text = run("--service", "osv", "--osv-url", url)
    assert (status, "nothing is known against them" in text) == (0, True), text


def test_a_service_that_fails_or_is_away_has_its_own_status() -> None:
    with advisory_service(lambda question: None) as url:
        status, text = run("--service", "osv", "--osv-url", url)
    assert status == NOT_AUDITED and f"NOT AUDITED: {len(LOCKED)} packages" in text, text
    away = f"http://127.0.0.1:{free_port()}/v1/query"
    status, text = run("--service", "osv", "--osv-url", away)
    assert status == NOT_AUDITED and "no all-clear" in text, text


def test_an_expired_waiver_is_red_even_where_the_service_is_away(tmp_path: Path) -> None:
    (tmp_path / "waivers.toml").write_text(waiver(TODAY - timedelta(1)))
    away = f"http://127.0.0.1:{free_port()}/v1/query"
    files = "--waivers", str(tmp_path / "waivers.toml")
    status, text = run("--service", "osv", "--osv-url", away, *files)
    assert status == RED and "ended on" in text and "NOT AUDITED" in text, text
