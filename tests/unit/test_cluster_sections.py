"""The parts of docs/results.md about clusters: what they say is what was measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cluster_sections import (
    render_faults,
    render_preprocess,
    render_scale,
    render_telemetry,
)

HERE = Path("x.json")


def test_launchers_are_compared_with_the_local_one() -> None:
    row = {
        "tasks_per_second": 10.0,
        "seconds_to_the_third_step": 4.0,
        "share_of_the_run": {"checkpoints": 0.012},
        "rounds": 3,
    }
    rows = {"local": row, "torchrun": {**row, "tasks_per_second": 8.0}}
    text = render_faults({"workers": 2, "steps": 20, "launchers": rows}, HERE)
    assert "| launcher | tasks/s | of local | third step after | checkpoints |" in text
    assert "| torchrun | 8.0 | 0.80 | 4.0 s | 1.200% |" in text


def test_each_kind_of_tracking_server_is_a_row() -> None:
    row = {"seconds_a_point": 0.00015, "recorder_share_of_a_core": 0.0019}
    text = render_telemetry({"seconds": 60.0, "servers": {"refuses": row}}, HERE)
    assert "for\n60 seconds" in text and "| refuses | 150 | 0.19% |" in text


def test_each_way_of_preprocessing_is_a_row() -> None:
    row = {"way": "pool", "pictures_per_second": 1500.4, "minimum": 1000.0, "maximum": 2000.0}
    text = render_preprocess({"machine": "a box", "rows": [row]}, HERE)
    assert "on a box" in text and "| pool | 1,500 | 1,000 to 2,000 |" in text


def test_the_model_stands_beside_what_was_measured() -> None:
    check = {
        "workers": 4,
        "measured_seconds": 0.5,
        "modelled_seconds": 0.45,
        "error": -0.1,
        "oversubscribed": True,
    }
    points = [{"workers": 1, "speedup": 1.0}, {"workers": 64, "speedup": 50.0}]
    takes_over = {"compute": 1, "metrics": 64}
    curves = {"64 groups": {"points": [*points], "takes_over": takes_over}}
    text = render_scale({"cores": 2, "checks": [check], "curves": curves}, HERE, Path("a.png"))
    assert "| 4 (sharing cores) | 500 | 450 | -10.0% |" in text
    assert "| 64 groups | compute from 1, metrics from 64 | 50x on 64 |" in text
