"""Amounts of CPU, memory, disk and GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from infra.manifests.documents import Documents, Finding, find, inside, mapping
from infra.manifests.pods import pods

_QUANTITY = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?\d+)?"
)
_UNITS = {
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
    **{unit: Decimal(1000) ** -power for power, unit in enumerate("mun", 1)},
}
_FIELDS = ("sizeLimit", "nominalQuota", "borrowingLimit", "lendingLimit")
_NEEDED = ("cpu", "memory", "ephemeral-storage")


def amount(value: Any) -> Decimal | None:
    """A quantity as a number, such as 0.5 for `500m`; None if it is none."""
    matched = _QUANTITY.fullmatch(str(value))
    if isinstance(value, bool) or matched is None:
        return None
    number, unit = matched.groups()
    try:
        if unit and unit[0] in "eE" and len(unit) > 1:
            return Decimal(f"{number}{unit}")
        return Decimal(number) * _UNITS.get(unit or "", Decimal(1))
    except InvalidOperation:
        return None


def quantities(documents: Documents) -> list[Finding]:
    """Amounts can be read, and none is negative."""
    found = []
    for where, value in inside(documents):
        amounts = {field: value[field] for field in _FIELDS if field in value}
        for field in ("requests", "limits"):
            amounts |= {f"{field}.{k}": v for k, v in mapping(value.get(field)).items()}
        for field, one in amounts.items():
            number = amount(one)
            if number is None or number < 0:
                found.append(
                    Finding(
                        f"{where}.{field}",
                        f"{one!r} is no amount",
                        "Write a number with a unit, such as 500m for CPUs or 4Gi for bytes.",
                    )
                )
            elif "memory" in field and 0 < number < 2**20:
                found.append(
                    Finding(
                        f"{where}.{field}", f"{one!r} is less than one MiB", "Write 512Mi or so."
                    )
                )
    return found


def limits(documents: Documents) -> list[Finding]:
    """No container asks for more than it may have, and devices are whole."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            resources = mapping(container.get("resources"))
            asked, most = mapping(resources.get("requests")), mapping(resources.get("limits"))
            for name in {*asked, *most}:
                low, high = amount(asked.get(name)), amount(most.get(name))
                if low is not None and high is not None and low > high:
                    what = f"it asks for {asked[name]} {name} and may have {most[name]}"
                    found.append(Finding(f"{where}.resources", what, "Raise the limit."))
                if "/" in str(name) and (high is None or low not in (None, high) or high % 1):
                    what = f"{name}: {asked.get(name)} asked for, {most.get(name)} allowed"
                    mend = "Of a device both are the same whole number; a limit is needed."
                    found.append(Finding(f"{where}.resources", what, mend))
    return found


def resources(documents: Documents) -> list[Finding]:
    """Every container says what it needs and what it may have at most."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            given = mapping(container.get("resources"))
            lost = [
                f"{field}.{name}"
                for field in ("requests", "limits")
                for name in _NEEDED
                if name not in mapping(given.get(field))
            ]
            if lost:
                found.append(
                    Finding(
                        f"{where}.resources",
                        f"{', '.join(lost)} not set",
                        "Without them a node may be filled up by one pod. Set them.",
                    )
                )
    return found


def folders(documents: Documents) -> list[Finding]:
    """What pods write into has an end, and fits the memory and disk that they may have."""
    found = []
    for pod in pods(documents):
        room = _room(pod.containers[0].value) if pod.containers else {}
        disk = Decimal(0)
        for place in find(pod.spec, "volumes[]", pod.where):
            folder = mapping(place.value).get("emptyDir")
            if folder is None:
                continue
            size = amount(mapping(folder).get("sizeLimit"))
            if size is None:
                found.append(Finding(f"{place.where}.emptyDir", "it has no sizeLimit", "Set one."))
                continue
            if mapping(folder).get("medium") != "Memory":
                disk += size
            elif size > room.get("memory", size):
                what = f"{folder['sizeLimit']} of memory is more than the container may have"
                found.append(Finding(f"{place.where}.emptyDir", what, "Lower it."))
        if disk > room.get("ephemeral-storage", disk):
            what = "the emptyDirs together may hold more than limits.ephemeral-storage"
            found.append(
                Finding(f"{pod.where}.volumes", what, "Raise the limit, or lower sizeLimit.")
            )
    return found


def _room(container: Mapping[str, Any]) -> dict[str, Decimal]:
    given = mapping(mapping(container.get("resources")).get("limits"))
    return {str(k): number for k, v in given.items() if (number := amount(v)) is not None}
