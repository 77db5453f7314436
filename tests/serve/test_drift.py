"""What replicas count of their champion's queries, where it can be read, and what is not counted."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from pipeline.core.errors import MachineError
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.drift import BINS, DriftRules, Reference, added_up, drift_in, served_drift
from pipeline.deploy.drift_reference import make_reference
from pipeline.deploy.registry import Registry
from pipeline.deploy.serve.drift import Traffic
from pipeline.deploy.serve.learners import TRAFFIC, open_database
from pipeline.deploy.serve.messages import (
    ModelRef,
    Neighbour,
    Prediction,
    Predictions,
    Probability,
)
from pipeline.deploy.serve.model import Version
from pipeline.store.reader import Store
from pipeline.tasks.frozen import read_episodes
from tests.serve.asking import http, queries, support
from tests.serve.registered import NAME, register
from tests.serve.service_process import REPOSITORY, ServiceProcess
from tests.unit.tiny_learner import NUMBERS, save, tiny_bundle, tiny_learner

RULES = DriftRules(least_queries=20, least_learners=10)
SIDE = 12


def even_reference() -> Reference:
    """Every rank is as wide as any other: it is known by hand where a value belongs."""
    edges = np.stack([np.linspace(-1, 1, BINS + 1)[1:-1], np.linspace(0, 1, BINS + 1)[1:-1]])
    return Reference(
        split="val",
        episodes={},
        classes=10,
        shapes=[(2, 1), (2, 2), (5, 1)],
        edges=[edges.tolist()] * 3,
        shares=[[[1 / BINS] * BINS] * 2] * 3,
        noise=np.zeros((2 * BINS, 2 * BINS)).tolist(),
    )


def bundle_with_reference(folder: Path, seed: int) -> Bundle:
    learner = save(folder / f"learner-{seed}", tiny_learner(seed))
    target = folder / f"bundle-{seed}"
    card = "# A card\n"
    return make_bundle(
        target, learner, NUMBERS, domain="toy", card=card, reference=even_reference()
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Version 1 is champion, version 2 its challenger; both know what traffic should be like."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "registry"
    folder.mkdir()
    first, _ = register(folder, 1, make=bundle_with_reference)
    second, _ = register(folder, 2, make=bundle_with_reference)
    registry = Registry(folder, NAME)
    registry.promote(first)
    registry.challenge(second)
    return folder


@pytest.fixture
def replicas(root: Path, tmp_path: Path) -> Iterator[list[ServiceProcess]]:
    """Two, of which one lets the challenger answer in the shadow, and the other half for real."""
    begun = []
    for number, challenge in enumerate(({"shadow": 1.0}, {"share": 0.5})):
        own: dict[str, Any] = {
            "database": f"sqlite:///{tmp_path / 'shared.db'}",
            "poll_seconds": 0.3,
            "challenge": challenge,
        }
        service = ServiceProcess(tmp_path / f"replica-{number}", NAME, **own)
        begun.append(service)
        service.start(environment={"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"})
    yield begun
    for service in begun:
        if service.process is not None and service.process.poll() is None:
            service.stop()


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {
        tuple(v for k, v in sorted(one.labels.items()) if k != "le"): one.value
        for family in families
        if family.name == name
        for one in family.samples
        if one.labels.get("le") == "+Inf"
    }


def test_all_replicas_are_added_up_and_only_the_champions_answers_count(
    root: Path, replicas: list[ServiceProcess]
) -> None:
    first, second = replicas
    key = first.key()
    asked = {"champion": 0, "by challenger": 0}
    with http(first, key) as one, http(second, key) as two:
        for seed in range(30):
            for web in (one, two):
                body = {"support": support(seed=seed), "queries": queries(3, seed=seed)}
                told = web.post("/v1/predict", json=body).json()
                who = "champion" if told["model"]["version"] == 1 else "by challenger"
                asked[who] += 3
        kept = one.post("/v1/learners", json={"support": support(5, 1)}).json()["id"]
        for web in (one, two):  # the same learner, wherever it is asked
            answer = web.post(f"/v1/learners/{kept}/predict", json={"queries": queries(4)})
            who = "champion" if answer.json()["model"]["version"] == 1 else "by challenger"
            asked[who] += 4
        body = {"support": support(), "queries": queries(5), "against": "challenger"}
        assert one.post("/v1/predict", json=body).json()["model"]["version"] == 2
        assert one.post("/v1/predict", json={"support": support()}).status_code == 422
        metrics = [web.get("/metrics").text for web in (one, two)]
    assert asked["by challenger"] > 9, "or nothing is left out"
    for name in ("metaloom_query_similarity", "metaloom_query_confidence"):
        assert sum(samples(text, name)[("1",)] for text in metrics) == asked["champion"]
        assert all(samples(text, name).get(("2",), 0.0) == 0 for text in metrics)
    ranked = [samples(text, "metaloom_query_rank") for text in metrics]
    assert sum(one["similarity", "1"] for one in ranked) == asked["champion"]
    for service in replicas:
        service.stop()

    bundle = Registry(root, NAME).version(1).digest
    told = served_drift(first.database, bundle, RULES)
    assert (told.queries, told.bundle, told.days) == (asked["champion"], bundle, 7)
    assert told.verdict in ("drift", "steady") and told.similarity and told.confidence
    truth = len({json.dumps(support(seed=seed)) for seed in range(30)}) + 1
    assert told.learners == pytest.approx(truth, rel=0.35), "asked in two places, they are one each"
    assert served_drift(first.database, Registry(root, NAME).version(2).digest).queries == 0
    assert served_drift(first.database, "0" * 64).verdict == "unknown"

    engine = open_database(first.database)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(TRAFFIC)).all()
    assert len({row.replica for row in rows}) == 2
    counts = added_up([row.told for row in rows], 3)
    assert counts.shapes.sum() == asked["champion"]
    assert 0 < counts.shapes[2] <= 8 and counts.shapes[0] == 0, "two classes of two each, or five"
    content = "".join(row.told for row in rows)
    assert "class" not in content and kept not in content, "numbers alone"


def test_release_status_says_it(root: Path, replicas: list[ServiceProcess]) -> None:
    service = replicas[0]
    with http(service, service.key()) as web:
        body = {"support": support(), "queries": queries(2)}
        assert web.post("/v1/predict", json=body).status_code == 200
    service.stop()
    command = [sys.executable, "-m", "pipeline.cli", "release", "status", "--model", NAME]
    command += ["--config", str(service.config)]
    told = []
    for more in ([], ["--json"]):
        done = subprocess.run(
            [*command, *more],
            cwd=root,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(done.stdout)
    text, found = told[0], json.loads(told[1])["drift"]
    assert "  drift       too few: 2 queries" in text
    assert max(map(len, text.splitlines())) <= 80
    assert (found["verdict"], found["queries"]) == ("too_few", 2)


def test_a_bundle_from_before_there_was_a_reference_serves_and_its_drift_is_unknown(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path)
    with ServiceProcess(tmp_path / "service", str(bundle.folder)) as service:
        with http(service, service.key()) as web:
            body = {"support": support(), "queries": queries(2)}
            assert web.post("/v1/predict", json=body).status_code == 200
            text = web.get("/metrics").text
        assert samples(text, "metaloom_query_similarity") == {("None",): 2.0}
        assert samples(text, "metaloom_query_rank") == {}
    told = served_drift(service.database, bundle.digest)
    assert told.verdict == "unknown" and "it has no reference" in told.why


# Without a process


def predictions(values: list[tuple[float, float]], ways: int = 2) -> Predictions:
    ref = ModelRef(name="toy", version=1, bundle="b")
    return Predictions(
        learner=None,
        model=ref,
        predictions=[
            Prediction(
                label="a",
                unknown=False,
                confidence=confidence,
                probabilities=[Probability(label="a", probability=confidence)] * ways,
                nearest=[Neighbour(example=0, label="a", similarity=similarity)],
            )
            for similarity, confidence in values
        ],
    )


@pytest.fixture
def version(tmp_path: Path) -> Version:
    bundle = bundle_with_reference(tmp_path, 0)
    return Version(ModelRef(name="toy", version=1, bundle=bundle.digest), bundle, 16)


def counts_in(traffic: Traffic) -> Any:
    with traffic.engine.connect() as connection:
        return added_up(connection.execute(sa.select(TRAFFIC.c.told)).scalars().all(), 3)


def test_a_query_is_counted_where_it_belongs(version: Version, tmp_path: Path) -> None:
    """By hand; more requests than are added up together; values at the very ends."""
    traffic = Traffic(open_database(f"sqlite:///{tmp_path / 'traffic.db'}"), "replica")
    for i in range(50):
        told = predictions([(-0.95, 0.99), (0.05, 0.51)])
        traffic.answered(version, f"learner {i}", 2, told)
    traffic.answered(version, "the ends", 5, predictions([(1.0, 1.0), (-1.0, 0.0)], ways=5))
    traffic.answered(version, "like none", 50, predictions([(0.0, 0.5)], ways=5))
    traffic.write(at_once=True)
    counts = counts_in(traffic)
    expected = np.zeros((2, BINS), int)
    expected[0, [0, 10]], expected[1, [19, 10]] = 50, 50
    expected[:, 0] += 1
    expected[:, -1] += 1
    assert np.array_equal(counts.ranks, expected)
    assert counts.shapes.tolist() == [100, 0, 2]


def test_nothing_is_lost_while_the_database_is_away(version: Version, tmp_path: Path) -> None:
    path = tmp_path / "traffic.db"
    traffic = Traffic(open_database(f"sqlite:///{path}"), "replica", write_seconds=0.0)
    traffic.answered(version, "a", 2, predictions([(0.5, 0.9)]))
    traffic.write()
    with sqlite3.connect(path) as connection:
        connection.execute("alter table traffic rename to away")
    traffic.answered(version, "b", 2, predictions([(0.5, 0.9)] * 2))
    with pytest.raises(MachineError):
        traffic.write()
    with sqlite3.connect(path) as connection:
        connection.execute("alter table away rename to traffic")
    traffic.write()
    assert counts_in(traffic).queries == 3
    traffic.write()
    assert counts_in(traffic).queries == 3, "written twice, counted once"


def test_only_the_days_that_are_asked_for_count(version: Version, tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'traffic.db'}")
    traffic = Traffic(engine, "replica")
    traffic.answered(version, "a", 2, predictions([(0.5, 0.9)] * 30))
    traffic.write(at_once=True)
    bundle = version.ref.bundle
    assert drift_in(engine, bundle, DriftRules(days=1)).queries == 30
    with engine.begin() as connection:
        connection.execute(sa.update(TRAFFIC).values(day="2020-01-01"))
        connection.execute(
            sa.insert(TRAFFIC).values(replica="another", bundle=bundle, day="9999-01-01", told="{}")
        )
    assert drift_in(engine, bundle, DriftRules(days=60)).queries == 0, "what is damaged is left out"
    traffic.answered(version, "a", 2, predictions([(0.5, 0.9)]))
    traffic.write(at_once=True)
    with engine.connect() as connection:
        days = connection.execute(sa.select(TRAFFIC.c.day)).scalars().all()
    assert "2020-01-01" not in days, "old days go"


def test_what_the_service_counts_of_validation_episodes_is_steady(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """The reference and the service mean the same by a rank."""
    learner = save(tmp_path / "learner", tiny_learner(0, blob_store.image_shape))
    first = make_bundle(tmp_path / "bundle", learner, NUMBERS, domain="blobs", card="#")
    episodes = read_episodes(blob_tasks, "val")
    reference = make_reference(first, blob_store, episodes)
    own = reference.shapes.index((4, 1))
    bundle = make_bundle(
        tmp_path / "bundle", learner, NUMBERS, domain="blobs", card="#", reference=reference
    )
    version = Version(ModelRef(name="blobs", version=1, bundle=bundle.digest), bundle, 16)
    traffic = Traffic(open_database(f"sqlite:///{tmp_path / 'traffic.db'}"), "replica")
    (frozen,) = episodes.values()
    for e in range(len(frozen.support_rows)):
        labels = frozen.support_labels[e].tolist()
        ready = version.learn(blob_store.gather(frozen.support_rows[e]), labels, 4)
        answers = version.answer(ready, blob_store.gather(frozen.query_rows[e]))
        pairs = torch_pairs(answers.similarity.amax(dim=1), answers.probabilities.amax(dim=1))
        traffic.answered(version, str(e), 4, predictions(pairs, ways=4))
    traffic.write(at_once=True)
    with traffic.engine.connect() as connection:
        rows = connection.execute(sa.select(TRAFFIC.c.told)).scalars().all()
    counts = added_up(rows, len(reference.shapes))
    shares = counts.ranks / counts.queries
    assert np.abs(shares - np.array(reference.shares[own])).max() < 0.02


def torch_pairs(similarity: Any, confidence: Any) -> list[tuple[float, float]]:
    return list(zip(similarity.tolist(), confidence.tolist(), strict=True))
