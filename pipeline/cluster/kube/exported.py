"""How far a driver's run is, for Prometheus: its own /metrics, while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.core.errors import MachineError

PORT_VARIABLE = "METALOOM_METRICS_PORT"
_GAUGES = {
    "step": "Steps of the stage that are done; of an evaluation, episodes",
    "num_steps": "Steps that the stage has",
    "tasks_per_second": "Tasks (episodes) a second, of all workers together",
    "eta_seconds": "Seconds that the stage still takes at this pace",
}
"""By the words of `metaloom cluster status`; Prometheus has them as metaloom_run_*."""
_LABELS = ("run", "stage")


@contextmanager
def exported() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Serve /metrics on METALOOM_METRICS_PORT, where that is set; yields what takes the progress.

    Only the stage that runs has values: those of the one before it go.

    Raises:
        MachineError: the port cannot be had, or is none.
    """
    port = os.environ.get(PORT_VARIABLE, "")
    if not port:
        yield lambda progress: None
        return
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    gauges = {
        name: Gauge(f"metaloom_run_{name}", text, _LABELS, registry=registry)
        for name, text in _GAUGES.items()
    }

    def note(progress: Mapping[str, Any]) -> None:
        for name, gauge in gauges.items():
            gauge.clear()
            if name in progress:
                gauge.labels(progress["run"], progress["stage"]).set(progress[name])

    try:
        server, thread = start_http_server(int(port), registry=registry)
    except (OSError, OverflowError, ValueError) as error:
        raise MachineError(
            f"{PORT_VARIABLE} is {port!r}, and no metrics can be served there: {error}. Name a "
            "free port, or unset it."
        ) from None
    try:
        yield note
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
