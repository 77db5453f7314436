"""Label and field selectors."""

from __future__ import annotations

import re
from typing import Any

from tests.infra.api_server.status import bad_request

_FIELDS = {
    "metadata.name",
    "metadata.namespace",
    "involvedObject.name",
    "involvedObject.kind",
    "involvedObject.uid",
    "involvedObject.namespace",
    "reason",
    "type",
    "status.phase",
    "spec.nodeName",
}


def _requirements(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def labels_match(item: dict[str, Any], text: str) -> bool:
    labels = item["metadata"].get("labels") or {}
    return all(_label_matches(labels, part) for part in _requirements(text))


def _label_matches(labels: dict[str, str], part: str) -> bool:
    if found := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", part):
        inside = labels.get(found[1]) in [value.strip() for value in found[3].split(",")]
        return inside if found[2] == "in" else not inside
    if found := re.fullmatch(r"([^!=\s]+)\s*(==|=|!=)\s*([^=\s]*)", part):
        same = labels.get(found[1]) == found[3]
        return not same if found[2] == "!=" else same
    if re.fullmatch(r"![^\s=]+", part):
        return part[1:] not in labels
    if re.fullmatch(r"[^\s=!]+", part):
        return part in labels
    raise bad_request(f'unable to parse requirement: found "{part}"')


def fields_match(item: dict[str, Any], text: str) -> bool:
    for part in _requirements(text):
        found = re.fullmatch(r"([^!=]+)(==|=|!=)(.*)", part)
        if not found or found[1] not in _FIELDS:
            raise bad_request(f"field label not supported: {part.partition('=')[0]}")
        value: Any = item
        for key in found[1].split("."):
            value = (value or {}).get(key)
        same = (value or "") == found[3]
        if same == (found[2] == "!="):
            return False
    return True
