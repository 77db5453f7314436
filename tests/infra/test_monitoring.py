"""Rules and dashboard: every metric exists, every rule fires when it should, every panel has data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
import yaml

from infra.monitoring.dashboard import TARGET, dashboard, queries
from pipeline.cluster.kube.exported import PORT_VARIABLE
from pipeline.cluster.kube.exported import exported as driver_metrics
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.drift import BINS, Reference
from pipeline.deploy.smoke import free_port
from tests.conftest import REPOSITORY
from tests.serve.asking import http, support
from tests.serve.asking import queries as pictures
from tests.serve.registered import NAME, move_by_hand, register
from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import NUMBERS, save, tiny_learner

RULES = REPOSITORY / "infra/monitoring/metaloom.rules.yaml"
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALL_RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL_RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in ALL_RULES if "record" in rule}
KUBE_STATE_METRICS = {
    "kube_cronjob_status_last_successful_time",
    "kube_cronjob_spec_suspend",
    "kube_job_status_active",
    "kube_job_status_failed",
    "kube_job_status_start_time",
}
"""From its documentation of CronJobs and Jobs; no service of ours has them."""
_PATIENCE_SECONDS = 60


def selectors(expression: str) -> Iterator[str]:
    """Names of the metrics in an expression, as Prometheus's grammar finds them."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name
        for name in ("expr", "vector_selector", "lhs", "rhs", "param"):
            child = getattr(node, name, None)
            if child is not None and not isinstance(child, (str, int, float)):
                yield from walk(child)
        for child in getattr(node, "args", None) or ():
            yield from walk(child)

    yield from walk(promql_parser.parse(expression))


def test_every_expression_parses_and_names_a_metric() -> None:
    for expression in [rule["expr"] for rule in ALL_RULES] + queries():
        found = set(selectors(expression))
        written = set(re.findall(r"\b(?:metaloom|kube|route:metaloom)[a-z_:0-9]+", expression))
        assert found and found == {name for name in written if name not in ("metaloom",)}, (
            expression
        )
    with pytest.raises(ValueError):
        promql_parser.parse("sum by (metaloom_ready")


def bundle_with_reference(folder: Path, seed: int) -> Bundle:
    """One whose queries are ranked; the validation queries are made up."""
    learner = save(folder / f"learner-{seed}", tiny_learner(seed))
    edges = np.linspace(-1, 1, BINS + 1)[1:-1].tolist()
    even = [1 / BINS] * BINS
    reference = Reference(
        split="val",
        episodes={"5w1s": "0" * 64},
        classes=20,
        shapes=[(2, 2)],
        edges=[[edges, edges]],
        shares=[[even, even]],
        noise=np.zeros((2 * BINS, 2 * BINS)).tolist(),
    )
    target = folder / f"bundle-{seed}"
    return make_bundle(
        target, learner, NUMBERS, domain="toy", card="# A card\n", reference=reference
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One that has been asked, and been told nonsense."""
    root = tmp_path_factory.mktemp("monitored")
    register(root, 0, make=bundle_with_reference)
    register(root, 1, make=bundle_with_reference)
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    move_by_hand(root, 1)
    served = ServiceProcess(root / "service", NAME, challenge={"shadow": 1.0}, poll_seconds=1)
    served.start(environment=environment)
    try:
        move_by_hand(root, 2, "challenger")
        key = served.key()
        _until(lambda: 'role="challenger"' in scraped(served), served.log)
        ask(served, key, 5)
        _until(lambda: re.search('outcome="(agreed|differed)"', scraped(served)), served.log)
        yield served
    finally:
        assert served.stop() == 0


@pytest.fixture(scope="module")
def driver() -> Iterator[int]:
    """The port of a driver's metrics, in the middle of meta-training."""
    port = free_port()
    progress = {"run": "metaloom-retrain-29385120", "stage": "meta_train"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PORT_VARIABLE, str(port))
        with driver_metrics() as note:
            numbers = {"step": 8, "num_steps": 64, "tasks_per_second": 2.5, "eta_seconds": 179.2}
            note({**progress, **numbers})
            yield port


def ask(served: ServiceProcess, key: str, times: int) -> None:
    with http(served, key) as client:
        made = client.post("/v1/learners", json={"support": support()})
        assert made.status_code in (200, 201), made.text
        for _ in range(times):
            path = f"/v1/learners/{made.json()['id']}/predict"
            assert client.post(path, json={"queries": pictures(3)}).status_code == 200
        assert client.post("/v1/predict", json={"nonsense": 1}).status_code == 422
        assert client.get("/healthz").status_code == 200


def scraped(served: ServiceProcess) -> str:
    return told_at(served.url)


def told_at(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return str(answer.read().decode())


def names(text: str) -> set[str]:
    """Of the samples of /metrics."""
    return set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))


def test_every_metric_of_rules_and_dashboard_exists(service: ServiceProcess, driver: int) -> None:
    present = names(scraped(service)) | names(told_at(f"http://127.0.0.1:{driver}"))
    named = {n for rule in ALL_RULES for n in selectors(rule["expr"])}
    named |= {n for query in queries() for n in selectors(query)}
    assert len(named) > 15
    assert named - RECORDED - KUBE_STATE_METRICS <= present
    assert named >= KUBE_STATE_METRICS


def test_the_accuracy_of_the_champion_is_told(service: ServiceProcess) -> None:
    text = scraped(service)
    assert 'metaloom_champion_accuracy{setting="5w1s",version="1"} 0.9' in text
    assert text.count("metaloom_champion_accuracy{") == 1  # the challenger is none


@dataclass(frozen=True)
class Case:
    """Series; a rule that fires, and others close by with which it does not."""

    fires: dict[str, str]
    quiet: dict[str, str]
    at: str = "30m"
    times: int = 1
    also: Sequence[dict[str, str]] = field(default_factory=list)
    """More quiet ones."""
    every: str = "1m"
    """Between two samples, and between two looks at the rules"""


def counts(metric: str, each: Sequence[tuple[str, int]]) -> dict[str, str]:
    """Counters that grow by so much from sample to sample."""
    return {f"{metric}{{{labels}}}": f"0+{step}x1600" for labels, step in each}


def latencies(fast: int, slow: int) -> dict[str, str]:
    labels = 'route="POST /v1/predict"'
    name = "metaloom_request_seconds_bucket"
    return counts(
        name,
        [
            (f'{labels},le="0.1"', fast),
            (f'{labels},le="2.5"', fast + slow),
            (f'{labels},le="+Inf"', fast + slow),
        ],
    )


def ranks(low: int, high: int) -> dict[str, str]:
    """So many queries from sample to sample in the lower and the upper half."""
    labels = 'version="3",signal="similarity"'
    series = [(f'{labels},le="0.50"', low), (f'{labels},le="+Inf"', low + high)]
    series.insert(1, (f'{labels},le="0.95"', low + high))
    return counts("metaloom_query_rank_bucket", series)


def status(code: str, step: int) -> tuple[str, int]:
    return f'route="POST /v1/predict",status="{code}"', step


REQUESTS = "metaloom_requests_total"
NIGHT = 'cronjob="metaloom-retrain"'
RUN = 'job_name="metaloom-retrain-29385120"'
STAGE = 'run="metaloom-retrain-29385120",stage="meta_train"'
STEPS = {f"metaloom_run_num_steps{{{STAGE}}}": "64x60"}
CASES = {
    "MetaloomDown": Case(
        {'metaloom_ready{instance="a"}': "1 0x60", 'metaloom_ready{instance="b"}': "0x60"},
        {'metaloom_ready{instance="a"}': "1x60", 'metaloom_ready{instance="b"}': "0x60"},
    ),
    "MetaloomReplicaNotReady": Case(
        {'metaloom_ready{instance="a"}': "1x60", 'metaloom_ready{instance="b"}': "0x60"},
        {'metaloom_ready{instance="a"}': "1x60", 'metaloom_ready{instance="b"}': "0x25 1x60"},
    ),
    "MetaloomErrors": Case(
        counts(REQUESTS, [status("200", 97), status("500", 3)]),
        counts(REQUESTS, [status("200", 900), status("500", 3)]),
        also=[counts(REQUESTS, [status("200", 50), status("503", 50)]), {}],
    ),
    "MetaloomTurnsAway": Case(
        counts(REQUESTS, [status("200", 90), status("429", 5), status("503", 5)]),
        counts(REQUESTS, [status("200", 97), status("429", 3)]),
        also=[counts(REQUESTS, [status("200", 50), status("500", 50)])],
    ),
    "MetaloomSlow": Case(latencies(90, 10), latencies(98, 2)),
    "MetaloomBacklog": Case(
        {'metaloom_waiting{instance="a"}': "200x60"},
        {'metaloom_waiting{instance="a"}': "100x20 200x2 100x60"},
    ),
    "MetaloomVersionRefused": Case(
        {'metaloom_refused_versions{instance="a"}': "1x60"},
        {'metaloom_refused_versions{instance="a"}': "0x20 1x5 0x60"},
    ),
    "MetaloomReplicasDisagree": Case(
        {f'metaloom_serving{{instance="{i}",role="champion",version="{i}"}}': "1x60" for i in "12"},
        {f'metaloom_serving{{instance="{i}",role="champion",version="1"}}': "1x60" for i in "12"},
    ),
    "MetaloomChampionFails": Case(
        counts(
            "metaloom_answers_total",
            [('version="3",outcome="answered"', 99), ('version="3",outcome="failed"', 1)],
        ),
        counts(
            "metaloom_answers_total",
            [
                ('version="3",outcome="answered"', 999),
                ('version="3",outcome="failed"', 1),
                ('version="3",outcome="differed"', 500),
            ],
        ),
    ),
    "MetaloomChampionChangesOften": Case(
        {'metaloom_switches_total{instance="a",role="champion"}': "1x10 2x10 4x10 8x1600"},
        {'metaloom_switches_total{instance="a",role="champion"}': "1x10 2x10 3x1600"},
        at="60m",
    ),
    "MetaloomDrift": Case(
        ranks(9, 1),
        ranks(5, 5),
        at="1500m",
        also=[{k: "0+0.1x1600" for k in ranks(9, 1)}],
        every="5m",
    ),
    "MetaloomRetrainingStale": Case(
        {
            f"kube_cronjob_status_last_successful_time{{{NIGHT}}}": "0x140",
            f"kube_cronjob_spec_suspend{{{NIGHT}}}": "0x140",
        },
        {
            f"kube_cronjob_status_last_successful_time{{{NIGHT}}}": "0x140",
            f"kube_cronjob_spec_suspend{{{NIGHT}}}": "1x140",
        },
        at="3000m",
        also=[
            {
                f"kube_cronjob_status_last_successful_time{{{NIGHT}}}": "100000x140",
                f"kube_cronjob_spec_suspend{{{NIGHT}}}": "0x140",
            }
        ],
        every="30m",
    ),
    "MetaloomRetrainingFailed": Case(
        {f"kube_job_status_failed{{{RUN}}}": "0x5 1x60"},
        {
            f"kube_job_status_failed{{{RUN}}}": "0x60",
            'kube_job_status_failed{job_name="x"}': "1x60",
        },
        also=[{'kube_job_status_failed{job_name="metaloom-backup-1"}': "1x60"}],
    ),
    "MetaloomRetrainingStands": Case(
        {f"metaloom_run_step{{{STAGE}}}": "0+1x20 20x60", **STEPS},
        {f"metaloom_run_step{{{STAGE}}}": "0+0.1x600", **STEPS},
        at="60m",
        also=[
            {f"metaloom_run_step{{{STAGE}}}": "0+1x20 64x60", **STEPS},  # it is done
            {f"metaloom_run_step{{{STAGE}}}": "_x50 0x60", **STEPS},  # it has just begun
        ],
    ),
    "MetaloomRetrainingLong": Case(
        {
            f"kube_job_status_start_time{{{RUN}}}": "0x600",
            f"kube_job_status_active{{{RUN}}}": "1x600",
        },
        {
            f"kube_job_status_start_time{{{RUN}}}": "0x600",
            f"kube_job_status_active{{{RUN}}}": "0x600",
        },
        at="500m",
    ),
}


def test_every_alert_has_a_case_and_says_how_to_mend_it() -> None:
    assert set(CASES) == set(ALERTS)
    for rule in ALERTS.values():
        assert set(rule["annotations"]) == {"summary", "mend"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert any(rule["labels"]["severity"] == "critical" for rule in ALERTS.values())


def promtool() -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: the package `prometheus`)")
    return program


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(
        [promtool(), "check", "rules", "--lint-fatal", str(RULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALL_RULES)} rules found" in done.stdout


def _one(name: str, series: dict[str, str], case: Case, number: int | None) -> dict[str, Any]:
    expected = [] if number is None else [{"labels": "{}", "value": number}]
    firing = f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'
    return {
        "interval": case.every,
        "name": name,
        "input_series": [{"series": k, "values": v} for k, v in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": case.at, "exp_samples": expected}],
    }


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_when_it_should_and_not_otherwise(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tests = [_one(name, case.fires, case, case.times)]
    tests += [_one(name, quiet, case, None) for quiet in (case.quiet, *case.also)]
    if not case.also:
        tests.append(_one(name, {"up": "1x60"}, case, 1 if name == "MetaloomDown" else None))
    path = tmp_path / "test.yaml"
    asked = {"rule_files": [str(RULES)], "evaluation_interval": case.every, "tests": tests}
    path.write_text(yaml.safe_dump(asked))
    command = [promtool(), "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The same with the expectation turned round must fail, or nothing was tested.
    tests[0]["promql_expr_test"][0]["exp_samples"] = []
    path.write_text(yaml.safe_dump(asked))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_the_dashboard_is_the_one_of_the_code() -> None:
    assert json.loads(TARGET.read_text()) == dashboard(), (
        "run: python -m infra.monitoring.dashboard"
    )


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 15
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_grafanas_own_types_read_the_dashboard_and_lose_nothing() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    ours = dashboard()
    back = json.loads(encoder.JSONEncoder(sort_keys=True).encode(models.Dashboard.from_json(ours)))

    def lost(mine: Any, theirs: Any, path: str) -> Iterator[str]:
        if isinstance(mine, dict):
            for key, value in mine.items():
                if key not in theirs:
                    yield f"{path}.{key}"
                else:
                    yield from lost(value, theirs[key], f"{path}.{key}")
        elif isinstance(mine, list):
            for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
                yield from lost(one, other, f"{path}[{i}]")
        elif mine != theirs:
            yield path

    assert list(lost(ours, back, "")) == []


@pytest.fixture(scope="module")
def prometheus(
    service: ServiceProcess, driver: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A real one, on loopback, that scrapes the service and a driver, and has our rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: the package `prometheus`)")
    folder = tmp_path_factory.mktemp("prometheus")
    rules = folder / "rules.yaml"
    rules.write_text(RULES.read_text().replace("interval: 30s", "interval: 1s"))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": "metaloom",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{service.port}", f"127.0.0.1:{driver}"]}
                ],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: bool(_value(url, "metaloom_ready")), folder / "log")
        key = service.key()
        ask(service, key, 3)
        more = "sum(increase(metaloom_rows_together_count[1m])) > 0"
        _until(lambda: bool(_value(url, more)), folder / "log")
        _until(lambda: bool(_value(url, "metaloom:errors:ratio5m == 0")), folder / "log")
        _until(lambda: bool(_value(url, "metaloom_run_step")), folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _until(holds: Any, log: Path) -> None:
    begin = time.monotonic()
    while True:
        try:
            if holds():
                return
        except OSError:
            pass
        assert time.monotonic() - begin < _PATIENCE_SECONDS, log.read_text()[-3000:]
        time.sleep(0.5)


def _value(url: str, expression: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
        told = json.load(answer)
    assert told["status"] == "success"
    found: list[dict[str, Any]] = told["data"]["result"]
    return found


def test_every_panel_has_data_from_a_real_service(prometheus: str, service: ServiceProcess) -> None:
    empty = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            if not set(selectors(target["expr"])) & KUBE_STATE_METRICS:
                found = _value(prometheus, target["expr"])
                if not found or all(one["value"][1] == "NaN" for one in found):
                    empty.append((panel["title"], target["expr"]))
    assert empty == []


def test_the_rules_run_in_a_real_prometheus_and_none_fires(
    prometheus: str, service: ServiceProcess
) -> None:
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=10) as answer:
        groups = json.load(answer)["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(ALL_RULES)
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    (recorded,) = _value(prometheus, "metaloom:errors:ratio5m")
    assert float(recorded["value"][1]) == 0.0


def test_the_config_maps_hold_rules_and_dashboard() -> None:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    command = [program, "kustomize", str(RULES.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    maps = {one["metadata"]["name"]: one for one in yaml.safe_load_all(done.stdout)}
    assert yaml.safe_load(maps["metaloom-rules"]["data"]["metaloom.rules.yaml"])["groups"] == GROUPS
    found = maps["metaloom-dashboard"]
    assert json.loads(found["data"]["metaloom.json"]) == dashboard()
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {one["metadata"]["namespace"] for one in maps.values()} == {"metaloom"}


def test_the_operator_gets_the_same_rules() -> None:
    command = [sys.executable, "-m", "infra.monitoring.prometheus_rule"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    told = yaml.safe_load(done.stdout)
    assert told["kind"] == "PrometheusRule" and told["spec"] == {"groups": GROUPS}
