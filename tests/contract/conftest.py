"""The servers that some rows of the batteries need."""

from __future__ import annotations

from tests.cluster.conftest import cluster_folder, ray_cluster

__all__ = ["cluster_folder", "ray_cluster"]
