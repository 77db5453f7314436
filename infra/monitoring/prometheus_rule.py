"""`python -m infra.monitoring.prometheus_rule`: the rules as the Prometheus Operator wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_name("metaloom.rules.yaml")


def prometheus_rule() -> dict[str, Any]:
    """A custom resource; whether it is looked at depends on the operator's `ruleSelector`."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "metaloom",
            "namespace": "metaloom",
            "labels": {
                "app.kubernetes.io/name": "metaloom",
                "app.kubernetes.io/part-of": "metaloom",
            },
        },
        "spec": yaml.safe_load(RULES.read_text()),
    }


if __name__ == "__main__":
    print(yaml.safe_dump(prometheus_rule(), sort_keys=False, width=100), end="")
