"""What every campaign uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.chaos.campaign import Campaign, save
from tests.cluster.conftest import cluster_folder, ray_cluster, s3

__all__ = ["cluster_folder", "ray_cluster", "s3"]


@pytest.fixture
def campaign() -> Iterator[Callable[[str], Campaign]]:
    """Start a campaign by the name of its fault; at the end of the test it is saved, then checked."""
    begun: list[Campaign] = []

    def begin(fault: str) -> Campaign:
        begun.append(Campaign(fault))
        return begun[-1]

    yield begin
    for one in begun:
        save(one)
    for one in begun:
        one.check()


@pytest.fixture(autouse=True)
def _workers_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
