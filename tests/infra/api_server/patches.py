"""The kinds of patch: merge, strategic merge, and server-side apply as far as it is used."""

from __future__ import annotations

from typing import Any

_MERGED_BY = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "conditions": "type",
    "ownerReferences": "uid",
}


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386): null removes, lists are replaced."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def strategically_merged(target: Any, patch: Any, key: str = "") -> Any:
    """As `merged`, and lists of named things are merged by their names."""
    if isinstance(patch, list) and isinstance(target, list) and key in _MERGED_BY:
        return _merged_list(target, patch, _MERGED_BY[key])
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {k: v for k, v in patch.items() if k != "$patch"}
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = strategically_merged(result.get(name), value, name)
    return result


def _merged_list(target: list[Any], patch: list[Any], by: str) -> list[Any]:
    result = list(target)
    places = {item.get(by): index for index, item in enumerate(result)}
    gone = []
    for item in patch:
        place = places.get(item.get(by))
        if item.get("$patch") == "delete":
            gone.append(place)
        elif place is None:
            result.append(item)
        else:
            result[place] = strategically_merged(result[place], item)
    return [item for index, item in enumerate(result) if index not in gone]
