"""Made-up and damaged requests against a real service: `python -m tests.serve.fuzz --cases 5000`.

Cases are drawn by schemathesis from the service's own OpenAPI, valid ones and others, with a good
key. Half of the valid ones get real pictures, so that they go all the way. Then pictures and whole
bodies are damaged: bits, bytes, ends, types. `results/serve/fuzz.json` counts what must not be.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from pipeline.core.files import write_json
from tests.serve.asking import http, png, queries, support
from tests.serve.service_process import REPOSITORY, ServiceProcess
from tests.unit.tiny_learner import picture, tiny_bundle

RESULT = REPOSITORY / "results" / "serve" / "fuzz.json"
_HANG_SECONDS = 1.0
_UNSURE = 503
_RATES = {"requests_per_second": 10_000.0, "burst": 1_000_000}
_EXCLUDED = (
    "positive_data_acceptance",  # no schema tells which texts are pictures
    "ignored_auth",  # test_security.py tries every route with every kind of wrong key
)


@dataclass
class Tally:
    """What was sent, and what should not have come back."""

    cases: int = 0
    mutated_payloads: int = 0
    server_errors: int = 0
    schema_violations: int = 0
    crashes: int = 0
    hangs_over_1s: int = 0
    silently_wrong: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    """By status"""
    found: list[str] = field(default_factory=list)
    """The first of each kind of finding"""

    def note(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if sum(one.startswith(kind) for one in self.found) < 10:
            self.found.append(f"{kind}: {what[:600]}")

    def told(self) -> dict[str, Any]:
        return {**vars(self), "answered": dict(sorted(self.answered.items()))}


@dataclass
class Target:
    """The service, and a tally of what it does."""

    service: ServiceProcess
    key: str
    learner: str
    tally: Tally

    def judged(self, what: str, send: Callable[[], Any]) -> Any:
        """The answer, after a look at its status, its time, and whether the process lives."""
        begin = time.monotonic()
        answer = send()
        if time.monotonic() - begin > _HANG_SECONDS and self._hangs_again(send):
            self.tally.note("hangs_over_1s", what)
        status = int(answer.status_code)
        self.tally.answered[str(status)] += 1
        clean = status == _UNSURE and "retry-after" in {name.lower() for name in answer.headers}
        if status >= 500 and not clean:
            self.tally.note("server_errors", f"{status} {what}")
        process = self.service.process
        if process is None or process.poll() is not None:
            self.tally.note("crashes", what)
            self.service.start()
        return answer

    def taught(self, rng: random.Random) -> str:
        """A learner that may be deleted."""
        with http(self.service, self.key) as web:
            made = web.post("/v1/learners", json={"support": support(seed=rng.randrange(1, 99))})
        return str(made.json()["id"])

    @staticmethod
    def _hangs_again(send: Callable[[], Any]) -> bool:
        """Other work on the machine slows down one request, but hardly the same one twice."""
        begin = time.monotonic()
        send()
        return time.monotonic() - begin > _HANG_SECONDS


# --- drawn from OpenAPI -----------------------------------------------------------------------


def description(target: Target) -> dict[str, Any]:
    """The service's OpenAPI, without what it says of keys: ours is always a good one here."""
    with http(target.service) as web:
        told: dict[str, Any] = web.get("/openapi.json").json()
    for operations in told["paths"].values():
        for one in operations.values():
            one.pop("security")
    return told


def draw_cases(target: Target, told: dict[str, Any], cases: int, seed: int) -> None:
    """So many cases, spread over all operations, half of them valid."""
    import schemathesis
    from schemathesis.checks import load_all_checks
    from schemathesis.generation import GenerationMode

    load_all_checks()
    operations = [one.ok() for one in schemathesis.openapi.from_dict(told).get_all_operations()]
    while target.tally.cases < cases:
        each = max(1, (cases - target.tally.cases) // (2 * len(operations)))
        before = target.tally.cases
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _draw(target, operation, mode, each, seed)
        seed += 1
        assert target.tally.cases > before, "nothing more could be drawn"


def _draw(target: Target, operation: Any, mode: Any, number: int, seed: int) -> None:
    """Cases of one operation; where it takes nothing, nothing about it can be wrong."""
    import hypothesis
    from hypothesis import HealthCheck, Phase

    valid = mode.value == "positive"

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(mode))
    def try_one(case: Any) -> None:
        if valid:
            _make_likely(case, target)
        _try(target, case)

    try:
        try_one()
    except hypothesis.errors.Unsatisfiable:
        return


def _make_likely(case: Any, target: Target) -> None:
    """Give half of the cases a learner that is there, and pictures that are pictures."""
    choice = random.Random(repr((case.path_parameters, case.body)))
    if case.path_parameters and "id" in case.path_parameters and choice.random() < 0.7:
        gone = case.method == "DELETE"
        case.path_parameters["id"] = target.taught(choice) if gone else target.learner
    if case.path_parameters and "number" in case.path_parameters and choice.random() < 0.5:
        case.path_parameters["number"] = choice.randrange(4)
    if isinstance(case.body, dict) and choice.random() < 0.7:
        if "support" in case.body:
            case.body["support"] = support(choice.randint(1, 4), choice.randint(1, 3))
        if "queries" in case.body:
            case.body["queries"] = queries(choice.randint(1, 3))


def _try(target: Target, case: Any) -> None:
    import requests
    from schemathesis.checks import CHECKS
    from schemathesis.core.failures import Failure, FailureGroup

    headers = {"Authorization": f"Bearer {target.key}"}
    target.tally.cases += 1
    what = f"{case.method} {case.formatted_path} {str(case.body)[:300]}"

    def send() -> Any:
        return case.call(base_url=target.service.url, headers=headers, timeout=30)

    try:
        answer = target.judged(what, send)
    except (requests.exceptions.InvalidHeader, UnicodeError, requests.exceptions.InvalidURL):
        return  # what no client can send
    excluded = CHECKS.get_by_names([name for name in _EXCLUDED if name in CHECKS.get_all_names()])
    try:
        case.validate_response(answer, excluded_checks=excluded, headers=headers)
    except (Failure, FailureGroup) as error:
        failures = error.exceptions if isinstance(error, FailureGroup) else [error]
        for one in failures:
            if "server error" not in str(one.title).lower():  # counted already
                told = f"{one.title}: {one.message} <- {answer.status_code} {what}"
                target.tally.note("schema_violations", told)


# --- damaged ----------------------------------------------------------------------------------


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One to three bits turned over."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Without its end."""
    return content[: rng.randrange(len(content))]


def spliced(content: bytes, rng: random.Random) -> bytes:
    """A piece of it once more somewhere else."""
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    place = rng.randrange(len(content))
    return content[:place] + content[begin:end] + content[place:]


def noisy(content: bytes, rng: random.Random) -> bytes:
    """Some of its bytes replaced by any others."""
    begin = rng.randrange(len(content))
    return content[:begin] + rng.randbytes(rng.randint(1, 40)) + content[begin + 8 :]


DAMAGES = (flipped, cut, spliced, noisy)
OTHER_TYPES = (None, True, 0, -1, 1e308, "", "x", "\u0000", [], {}, [[]], {"image": "x"}, 2**70)


def swapped(body: Any, rng: random.Random) -> Any:
    """The same with one value of another type, somewhere inside."""
    if isinstance(body, dict) and body and rng.random() < 0.9:
        name = rng.choice(sorted(body))
        return {**body, name: swapped(body[name], rng)}
    if isinstance(body, list) and body and rng.random() < 0.9:
        place = rng.randrange(len(body))
        return [*body[:place], swapped(body[place], rng), *body[place + 1 :]]
    return rng.choice(OTHER_TYPES)


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, 24)).save(file, "JPEG")
    return file.getvalue()


def damage_pictures(target: Target, number: int, rng: random.Random) -> None:
    """PNG vouches for its bytes: damaged, it is refused, or gives the very same answer."""
    with http(target.service, target.key) as web:

        def ask(content: bytes) -> httpx.Response:
            body = {"queries": [{"image": base64.b64encode(content).decode()}]}
            return web.post(f"/v1/learners/{target.learner}/predict", json=body)

        for i in range(number):
            of_png = i % 4 != 3
            whole = png(i % 50) if of_png else jpeg(i % 50)
            damage = DAMAGES[i // 4 % len(DAMAGES)]
            content = damage(whole, rng)
            answer = target.judged(
                f"{damage.__name__} picture {content.hex()}", partial(ask, content)
            )
            target.tally.mutated_payloads += 1
            if of_png and answer.status_code == 200 and answer.text != ask(whole).text:
                target.tally.note("silently_wrong", f"{damage.__name__} {content.hex()}")


def damage_bodies(target: Target, number: int, rng: random.Random) -> None:
    """Bytes of JSON and of forms, and types within JSON."""
    body = {"support": support(), "queries": queries(2), "against": "champion"}
    as_json = json.dumps(body).encode()
    files = [("support[a]", ("a.png", png(1))), ("support[b]", ("b.png", png(2)))]
    form = httpx.Request("POST", "http://x", files=[*files, ("query", ("q.png", png(3)))])
    form_kind = form.headers["content-type"]
    as_form = form.read()
    kinds: Iterator[tuple[str, bytes, str]] = (
        [
            ("json", rng.choice(DAMAGES)(as_json, rng), "application/json"),
            ("types", json.dumps(swapped(body, rng)).encode(), "application/json"),
            ("form", rng.choice(DAMAGES)(as_form, rng), form_kind),
            ("kind", as_form, flipped(form_kind.encode(), rng).decode("latin-1")),
        ][i % 4]
        for i in range(number)
    )
    with http(target.service, target.key) as web:
        for name, content, kind in kinds:

            def send(content: bytes = content, kind: str = kind) -> httpx.Response:
                headers = {"content-type": kind.encode("latin-1")}
                return web.post("/v1/predict", content=content, headers=headers)  # type: ignore[arg-type]

            try:
                target.judged(f"{name} {content!r} {kind!r}", send)
            except httpx.LocalProtocolError:
                continue  # a header that no client can send
            target.tally.mutated_payloads += 1


def fuzz(folder: Path, cases: int, mutations: int, seed: int = 0) -> Tally:
    """Everything, against a service of its own in this folder."""
    rng = random.Random(seed)
    bundle = tiny_bundle(folder)
    with ServiceProcess(folder / "service", str(bundle.folder), rates=_RATES) as service:
        key = service.key()
        with http(service, key) as web:
            learner = web.post("/v1/learners", json={"support": support()}).json()["id"]
        target = Target(service, key, learner, Tally())
        damage_pictures(target, mutations // 2, rng)
        damage_bodies(target, mutations - mutations // 2, rng)
        draw_cases(target, description(target), cases, seed)
        log = service.log.read_text()
        for line in log.splitlines():
            if line.startswith("Traceback"):
                target.tally.note("server_errors", "a traceback in the log")
    return target.tally


def main() -> None:
    """Run it, write the result; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(Path(folder), options.cases, options.mutations, options.seed)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULT, tally.told())
    print(json.dumps(tally.told(), indent=2))
    raise SystemExit(bool(tally.found))


if __name__ == "__main__":
    main()
