"""Prometheus metrics of one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass
class Measures:
    """Counted where it happens, read at /metrics; no label is made of what clients send."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        """Make the metrics."""
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "metaloom_requests_total", "Answered requests.", ["route", "status"], **own
        )
        self.seconds = Histogram(
            "metaloom_request_seconds", "Until the answer.", ["route"], buckets=_SECONDS, **own
        )
        self.rows = Histogram(
            "metaloom_rows_together", "Query pictures embedded together.", buckets=_ROWS, **own
        )
        self.waiting = Gauge("metaloom_waiting", "Jobs that wait for the model.", **own)
        self.ready = Gauge("metaloom_ready", "1 while requests are answered.", **own)
        self.refused = Gauge("metaloom_refused_versions", "Versions kept out.", **own)
        self.serving = Gauge(
            "metaloom_serving", "1 for the version that serves.", ["role", "version"], **own
        )
        self.accuracy = Gauge(
            "metaloom_champion_accuracy",
            "Mean accuracy on the test episodes of a setting, as the champion was evaluated.",
            ["version", "setting"],
            **own,
        )
        self.judged_answers = Counter(
            "metaloom_answers_total",
            "Answers of a version: answered, failed; in the shadow: agreed, differed.",
            ["version", "outcome"],
            **own,
        )
        self.looks = Counter(
            "metaloom_looks_total", "Looks at what is to serve, well or in vain.", **own
        )
        self.switches = Counter("metaloom_switches_total", "Versions taken on.", ["role"], **own)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def judged(self, ref: ModelRef, outcome: str) -> None:
        """What a version did with a request."""
        self.judged_answers.labels(str(ref.version), outcome).inc()

    def serves(self, versions: Mapping[str, Version | None]) -> None:
        """What serves now, by role; what does not is not told of."""
        self.serving.clear()
        for role, version in versions.items():
            if version is not None:
                self.serving.labels(role, str(version.ref.version)).set(1)

    def switched(self, role: str, version: Version) -> None:
        """Another version serves."""
        self.switches.labels(role).inc()
        if role == "champion":
            self.accuracy.clear()
            for setting, numbers in version.bundle.evaluation.items():
                self.accuracy.labels(str(version.ref.version), setting).set(numbers["accuracy"])

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return generate_latest(self.registry)
