"""What a driver shows of its work, from what DVC and the stages print."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from urllib.error import URLError

import pytest

from pipeline.cluster.kube.driving import Listener, driving, run_of
from pipeline.cluster.kube.exported import exported
from pipeline.cluster.kube.lease import Held
from pipeline.core.errors import MachineError
from pipeline.deploy.smoke import free_port


def test_stage_step_and_rate_come_from_what_is_printed() -> None:
    held = Held()
    exported: list[Mapping[str, object]] = []
    listen = Listener("retrain-1a2b3c4d5e-00000000", held, exported.append)
    listen("Running stage 'meta_train':")
    assert json.loads(held.progress())["stage"] == "meta_train"
    line = {"event": "meta_train", "done": 8, "total": 64, "tasks_per_second": 2.5, "loss": 1.0}
    line["eta_seconds"] = 22.4
    for noise in (json.dumps(line), '{"event": torn', '{"event": "x", "done": "?"}', "x" * 9999):
        listen(noise)
    told = json.loads(held.progress())
    assert exported == [
        {"run": told["run"], "stage": "meta_train"},
        {key: value for key, value in told.items() if key != "updated"},
    ]
    assert told.pop("updated")
    assert told == {
        "run": "retrain-1a2b3c4d5e-00000000",
        "stage": "meta_train",
        "step": 8,
        "num_steps": 64,
        "tasks_per_second": 2.5,
        "eta_seconds": 22.4,
    }


def test_prometheus_reads_the_stage_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("METALOOM_METRICS_PORT", str(port))

    def scraped() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    first = {"run": "night", "stage": "meta_train", "step": 8, "num_steps": 64}
    with exported() as note:
        note({**first, "tasks_per_second": 2.5, "eta_seconds": 22.4})
        told = scraped()
        assert 'metaloom_run_tasks_per_second{run="night",stage="meta_train"} 2.5' in told
        assert 'metaloom_run_step{run="night",stage="meta_train"} 8.0' in told
        note({"run": "night", "stage": "evaluate"})
        assert "meta_train" not in scraped()
    with pytest.raises(URLError):
        scraped()  # a run that has ended


@pytest.mark.parametrize("port", ["none", "70000", "-1"])
def test_a_port_that_is_none_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALOOM_METRICS_PORT", port)
    with pytest.raises(MachineError, match=f"METALOOM_METRICS_PORT is '{port}'"), exported():
        pass


def test_a_pod_has_its_jobs_name_and_a_laptop_holds_no_lease() -> None:
    assert run_of("retrain-1a2b3c4d5e-00000000-x7k2p") == "retrain-1a2b3c4d5e-00000000"
    assert run_of("laptop") == "laptop"
    with driving() as listen:
        assert listen is None
