"""`python -m infra.monitoring.dashboard`: write the Grafana dashboard, dashboard.json.

Panels are written down here, a line each; what Grafana wants around them is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import write_bytes

TARGET = Path(__file__).with_name("dashboard.json")
SCHEMA_VERSION = 39
"""Of Grafana 11; later ones read it."""
_WIDTH, _HEIGHT = 8, 8
_COLUMNS = 24
_JOBS = '{job_name=~"(metaloom-)?retrain-.+"}'
"""Of the schedule, and of `metaloom cluster submit`."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One picture: queries with what their lines are called."""

    title: str
    text: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"


def _quantiles(metric: str, by: str, window: str, *levels: float) -> list[tuple[str, str]]:
    """Lines of a histogram; `{{x}}` is Grafana's for the value of a label."""
    label = f" {{{{{by}}}}}" if by else ""
    names = ", ".join(filter(None, (by, "le")))
    inner = f"sum by ({names}) (rate({metric}_bucket[{window}]))"
    return [(f"histogram_quantile({q}, {inner})", f"p{q * 100:g}{label}") for q in levels]


def _share(outcome: str, other: str, window: str) -> str:
    """Of a version's answers; 0 where no answer has had that outcome, and so no series is there."""

    def rate(outcomes: str) -> str:
        return f'sum by (version) (rate(metaloom_answers_total{{outcome=~"{outcomes}"}}[{window}]))'

    both = rate(f"{outcome}|{other}")
    return f"({rate(outcome)} or 0 * {both}) / {both}"


ROWS: dict[str, list[Panel]] = {
    "Requests": [
        Panel(
            "Requests per second",
            "Answered requests by status.",
            [("sum by (status) (rate(metaloom_requests_total[5m]))", "{{status}}")],
            "reqps",
        ),
        Panel(
            "Latency of predictions",
            "Until the answer, of the routes that predict.",
            [
                (
                    f"histogram_quantile({q}, sum by (le) (rate("
                    'metaloom_request_seconds_bucket{route=~"POST .*predict"}[5m])))',
                    f"p{q * 100:g}",
                )
                for q in (0.5, 0.95, 0.99)
            ],
            "s",
        ),
        Panel(
            "Latency by route, p95",
            "One answer in twenty takes longer.",
            _quantiles("metaloom_request_seconds", "route", "5m", 0.95),
            "s",
        ),
        Panel(
            "Errors, and requests turned away",
            "5xx without 503: faults. 429 and 503: more than was admitted.",
            [
                (
                    '(sum(rate(metaloom_requests_total{status=~"5..",status!="503"}[5m])) '
                    "or vector(0)) / sum(rate(metaloom_requests_total[5m]))",
                    "errors",
                ),
                (
                    '(sum(rate(metaloom_requests_total{status=~"429|503"}[5m])) or vector(0)) '
                    "/ sum(rate(metaloom_requests_total[5m]))",
                    "turned away",
                ),
            ],
            "percentunit",
        ),
        Panel(
            "Waiting for the model",
            "Jobs in the queue of each replica.",
            [("metaloom_waiting", "{{instance}}")],
        ),
        Panel(
            "Pictures together",
            "Query pictures that went through the network together, on average.",
            [
                (
                    "sum(rate(metaloom_rows_together_sum[5m])) "
                    "/ sum(rate(metaloom_rows_together_count[5m]))",
                    "pictures",
                )
            ],
        ),
    ],
    "Models": [
        Panel(
            "Who serves",
            "Replicas by role and version.",
            [("sum by (role, version) (metaloom_serving)", "{{role}} {{version}}")],
            kind="stat",
        ),
        Panel(
            "Accuracy of the champion",
            "On the test episodes, as it was evaluated.",
            [("max by (version, setting) (metaloom_champion_accuracy)", "{{version}} {{setting}}")],
            "percentunit",
        ),
        Panel(
            "Promotions and rollbacks",
            "Champions taken on within a day, by the replica that took on most.",
            [('max(increase(metaloom_switches_total{role="champion"}[1d]))', "within a day")],
        ),
        Panel(
            "Versions kept out, replicas ready",
            "A refused version is never served; `metaloom release status` says why.",
            [
                ("max(metaloom_refused_versions)", "refused versions"),
                ("sum(metaloom_ready)", "replicas ready"),
            ],
        ),
        Panel(
            "Answers that failed, by version",
            "Of all answers of a version.",
            [(_share("failed", "answered", "15m"), "{{version}}")],
            "percentunit",
        ),
        Panel(
            "The challenger agrees",
            "Share of queries that it answered in the shadow with the champion's label.",
            [(_share("agreed", "differed", "1h"), "{{version}}")],
            "percentunit",
        ),
    ],
    "Drift": [
        Panel(
            "Similarity of queries to their nearest example",
            "Cosine. What falls over days is further from what learners have seen.",
            _quantiles("metaloom_query_similarity", "version", "6h", 0.1, 0.5),
        ),
        Panel(
            "Confidence",
            "Probability of the most probable class, on average.",
            [
                (
                    "sum by (version) (rate(metaloom_query_confidence_sum[6h])) "
                    "/ sum by (version) (rate(metaloom_query_confidence_count[6h]))",
                    "{{version}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Rank among validation queries, median",
            "0.5 as long as traffic is what the champion was evaluated on.",
            [
                (
                    "histogram_quantile(0.5, sum by (version, signal, le) "
                    "(rate(metaloom_query_rank_bucket[1d])))",
                    "{{signal}} {{version}}",
                )
            ],
        ),
    ],
    "Retraining (by kube-state-metrics)": [
        Panel(
            "Since the last good night",
            "Since a retraining ended well.",
            [
                (
                    "time() - max(kube_cronjob_status_last_successful_time"
                    '{cronjob="metaloom-retrain"})',
                    "since",
                )
            ],
            "s",
            kind="stat",
        ),
        Panel(
            "Runs under way",
            "Logs: `metaloom cluster logs`; accuracy and losses: MLflow.",
            [
                (
                    f"sum by (job_name) (kube_job_status_active{_JOBS})",
                    "{{job_name}}",
                )
            ],
        ),
        Panel(
            "Tasks per second",
            "Of the stage that runs, all workers together.",
            [("sum by (run, stage) (metaloom_run_tasks_per_second)", "{{stage}} of {{run}}")],
        ),
        Panel(
            "Time left",
            "Of the stage that runs, at its present pace.",
            [("max by (run, stage) (metaloom_run_eta_seconds)", "{{stage}} of {{run}}")],
            "s",
        ),
        Panel(
            "Runs that failed",
            "Jobs that are kept for a look.",
            [
                (
                    f"sum by (job_name) (kube_job_status_failed{_JOBS})",
                    "{{job_name}}",
                )
            ],
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """As Grafana stores it."""
    return {
        "uid": "metaloom",
        "title": "Metaloom",
        "tags": ["metaloom"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                }
            ]
        },
        "annotations": {"list": [_switches()]},
        "panels": list(_panels()),
    }


def queries() -> list[str]:
    """Every PromQL expression of it."""
    written = [target["expr"] for panel in _panels() for target in panel.get("targets", ())]
    return [*written, _switches()["expr"]]


def _switches() -> dict[str, Any]:
    return {
        "name": "Another champion",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "purple",
        "expr": 'max(changes(metaloom_switches_total{role="champion"}[1m])) > 0',
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for row, panels in ROWS.items():
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": row, "gridPos": place, "collapsed": False}
        y += 1
        for i, panel in enumerate(panels):
            number += 1
            x = i * _WIDTH % _COLUMNS
            place = {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y + i * _WIDTH // _COLUMNS * _HEIGHT}
            yield _panel(number, panel, place)
        y += -(-len(panels) * _WIDTH // _COLUMNS) * _HEIGHT


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expr, "legendFormat": name}
            for i, (expr, name) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    write_bytes(TARGET, (json.dumps(dashboard(), indent=1) + "\n").encode())
