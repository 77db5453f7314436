"""The rows of the launchers' batteries, and the servers that some of them need."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.base import Launcher
from pipeline.launch.table import LAUNCHERS
from tests.cluster.conftest import cluster_folder, needs, ray_cluster
from tests.contract.drive import drive
from tests.infra.ray_cluster import training

__all__ = ["cluster_folder", "ray_cluster", "training"]

BY_NIGHT = [pytest.mark.cluster, pytest.mark.slow]
ROWS = [
    "local",
    "torchrun",
    pytest.param("ray_train", marks=pytest.mark.cluster),
    # Each time: that a killed driver finds its run again, in test_kubernetes_launcher.py.
    pytest.param("kubernetes", marks=BY_NIGHT),
]
every_launcher = pytest.mark.parametrize("name", ROWS)
clusters_by_night = pytest.mark.parametrize(
    "name",
    [*ROWS[:2], *(pytest.param(name, marks=BY_NIGHT) for name in ("ray_train", "kubernetes"))],
)
"""For what other tests see on a cluster by day too."""


@pytest.fixture
def launcher(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Launcher:
    """A launcher; Ray's in a process of its own, since Ray reads its token once, on import."""
    if name == "kubernetes":
        needs("ray", "kubernetes")
        told = request.getfixturevalue("training").environment
        return lambda job, folder: drive(
            name, job, folder, {**told, "METALOOM_NUM_WORKERS": str(job.num_workers)}
        )
    if name != "ray_train":
        return LAUNCHERS[name]
    environment = request.getfixturevalue("ray_cluster").environment
    return lambda job, folder: drive(name, job, folder, environment)
