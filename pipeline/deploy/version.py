"""One version of a registered model, as the registry tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUNDLE_TAG = "metaloom.bundle"


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


def version_of(name: str, found: Any) -> Version:
    """Of MLflow's own description of one."""
    return Version(name, int(found.version), dict(found.tags), found.source, found.run_id)
