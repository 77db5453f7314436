"""A registered model version, and the tags that say what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUNDLE_TAG, WEIGHTS_TAG = "metaloom.bundle", "metaloom.weights"
SMOKE_TAG, DAMAGED_TAG = "metaloom.smoke", "metaloom.damaged"
PASSED = "passed"
TOKEN_TAG = "metaloom.registration"
"""Of the attempt that made a version: tells it from another attempt at the same moment."""


@dataclass(frozen=True)
class Version:
    """One registered model version."""

    name: str
    number: int
    tags: Mapping[str, str]
    source: str
    run_id: str | None

    @property
    def digest(self) -> str:
        """Of its bundle, as recorded on registration; empty for a version that is not ours."""
        return self.tags.get(BUNDLE_TAG, "")

    @property
    def uri(self) -> str:
        """Its address for MLflow's own commands."""
        return f"models:/{self.name}/{self.number}"


def as_version(name: str, found: Any) -> Version:
    """What MLflow's client gives, as ours."""
    return Version(name, int(found.version), dict(found.tags), found.source, found.run_id)
