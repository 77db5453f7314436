"""What is shipped where GUARANTEES names a default: a change of one is a decision, seen here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import ray_train
from pipeline.launch.base import Job, max_restarts_from_environment
from pipeline.runtime.context import TIMEOUT_SECONDS
from pipeline.runtime.mlflow_tracker import quiet_environment
from tests.distributed.entries import Plan

_SHIPPED = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def test_a_dead_tracking_server_is_given_up_soon_and_nothing_is_unpickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in _SHIPPED:
        monkeypatch.delenv(name, raising=False)
    assert quiet_environment().items() >= _SHIPPED.items()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "9")
    assert quiet_environment()["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "9", "a user's own value holds"


def test_hung_workers_are_given_up_after_a_minute_and_restarts_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("METALOOM_MAX_RESTARTS", raising=False)
    assert (TIMEOUT_SECONDS, max_restarts_from_environment()) == (60.0, 3)


@pytest.mark.cluster
def test_what_ray_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hangs, failures and pre-emptions; and its data library is given no unsafe leave."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.delenv("METALOOM_TIMEOUT_SECONDS", raising=False)
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE", "1")
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    job = Job("tests.distributed.entries:identify", Plan(rank=0, what=""), 2, max_restarts=3)
    trainer: Any = ray_train._trainer(job, tmp_path, tmp_path / "token", None)
    failures = trainer.run_config.failure_config
    assert trainer.backend_config.timeout_s == 60
    assert failures.max_preemption_failures == -1 and failures.preemption_grace_s == 30.0
    assert failures.max_failures == -1, "the desk counts: three from one checkpoint"
    told = trainer.run_config.worker_runtime_env["env_vars"]
    assert not [name for name in told if name.startswith("RAY_DATA_")]
