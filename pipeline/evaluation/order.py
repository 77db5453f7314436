"""The order in which people want to read settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_size(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Measured settings of one domain in metrics.json, by ways, then shots (5w1s before 20w1s)."""

    def size(item: tuple[str, Mapping[str, Any]]) -> tuple[int, int]:
        protocol = item[1]["protocol"]
        return protocol["ways"], protocol["shots"]

    return sorted(settings.items(), key=size)
