"""What a driver shows of its work, from what DVC and the stages print."""

from __future__ import annotations

import json

from pipeline.cluster.kube.driving import Listener, driving, run_of
from pipeline.cluster.kube.lease import Held


def test_stage_step_and_rate_come_from_what_is_printed() -> None:
    held = Held()
    listen = Listener("retrain-1a2b3c4d5e-00000000", held)
    listen("Running stage 'meta_train':")
    assert json.loads(held.progress())["stage"] == "meta_train"
    line = {"event": "meta_train", "done": 8, "total": 64, "tasks_per_second": 2.5, "loss": 1.0}
    line["eta_seconds"] = 22.4
    for noise in (json.dumps(line), '{"event": torn', '{"event": "x", "done": "?"}', "x" * 9999):
        listen(noise)
    told = json.loads(held.progress())
    assert told.pop("updated")
    assert told == {
        "run": "retrain-1a2b3c4d5e-00000000",
        "stage": "meta_train",
        "step": 8,
        "num_steps": 64,
        "tasks_per_second": 2.5,
        "eta_seconds": 22.4,
    }


def test_a_pod_has_its_jobs_name_and_a_laptop_holds_no_lease() -> None:
    assert run_of("retrain-1a2b3c4d5e-00000000-x7k2p") == "retrain-1a2b3c4d5e-00000000"
    assert run_of("laptop") == "laptop"
    with driving() as listen:
        assert listen is None
