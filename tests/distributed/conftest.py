"""Where the workers of these tests run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _workers_stay_on_the_cpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those of `test_gpu.py`: starting CUDA in every worker would take most of the time."""
    if request.path.name != "test_gpu.py":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
