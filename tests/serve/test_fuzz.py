"""A small size of `make fuzz-serve`: nothing that is sent makes a fault (S1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.asking import http, support
from tests.serve.fuzz import Tally, Target, description, draw_cases, fuzz
from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import tiny_bundle

pytest.importorskip("schemathesis")


def test_what_is_drawn_and_what_is_damaged_makes_no_fault(tmp_path: Path) -> None:
    tally = fuzz(tmp_path, cases=100, mutations=200)
    assert tally.found == []
    assert tally.cases >= 100 and tally.mutated_payloads >= 150
    assert {"200", "400", "422"} <= set(tally.answered), "all ways are tried"


@pytest.mark.slow
def test_many_cases_make_no_fault(tmp_path: Path) -> None:
    assert fuzz(tmp_path, cases=5000, mutations=2000, seed=1).found == []


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with ServiceProcess(tmp_path / "service", str(tiny_bundle(tmp_path).folder)) as service:
        key = service.key()
        with http(service, key) as web:
            learner = web.post("/v1/learners", json={"support": support()}).json()["id"]
        yield Target(service, key, learner, Tally())


def test_an_answer_that_is_not_as_described_is_noticed(target: Target) -> None:
    """The check is checked: a description that promises other things."""
    told = description(target)
    told["paths"] = {path: told["paths"][path] for path in ("/healthz", "/v1/model")}
    told["components"]["schemas"]["Health"]["required"] = ["mood"]
    told["paths"]["/v1/model"]["get"]["responses"].pop("200")
    draw_cases(target, told, cases=4, seed=0)
    assert target.tally.schema_violations >= 2
