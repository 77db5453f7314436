"""The algorithms, by name: a new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.core.config import Section

ALGORITHMS: Mapping[str, type[Algorithm]] = {
    "protonet": ProtoNet,
    "maml": MAML,
    "nearest_centroid": NearestCentroid,
}


class AlgorithmConfig(Section):
    """Which algorithm, and the settings of each, so that one line switches."""

    name: Literal["protonet", "maml", "nearest_centroid"] = "protonet"
    """The algorithm to meta-train."""
    protonet: ProtoNet = ProtoNet()
    maml: MAML = MAML()
    nearest_centroid: NearestCentroid = NearestCentroid()

    def chosen(self) -> Algorithm:
        """The algorithm that `name` selects, with its settings."""
        algorithm: Algorithm = getattr(self, self.name)
        return algorithm
