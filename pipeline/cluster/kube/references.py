"""What a manifest names must be there: secrets, settings, accounts, claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError, MissingError
from pipeline.cluster.kube.kinds import CLAIMS, CONFIG_MAPS, SECRETS, SERVICE_ACCOUNTS, Kind


class Finding(NamedTuple):
    """One line of `metaloom cluster doctor`."""

    ok: bool
    name: str
    found: str
    mend: str = ""


_WAYS: tuple[tuple[Kind, str, str, str], ...] = (
    (SECRETS, "secret", "secret", "secretName"),
    (SECRETS, "secret", "secretRef", "name"),
    (SECRETS, "secret", "secretKeyRef", "name"),
    (SECRETS, "secret", "authOptions", "secretName"),
    (CONFIG_MAPS, "settings", "configMap", "name"),
    (CONFIG_MAPS, "settings", "configMapRef", "name"),
    (CONFIG_MAPS, "settings", "configMapKeyRef", "name"),
    (CLAIMS, "claim", "persistentVolumeClaim", "claimName"),
)
"""Kind, word for it, the field that refers, and the field in that with the name."""
_EVERYWHERE = "kube-root-ca.crt"
"""Kubernetes puts it into each namespace."""


def check_references(kube: Kube, item: Mapping[str, Any], apply: str) -> Iterator[Finding]:
    """A finding for each thing that a manifest needs; its content is not asked for.

    Args:
        apply: the command that brings what is no secret.
    """
    for kind, word, name in sorted(set(_named(item)), key=lambda row: (row[1], row[2])):
        mend = apply
        if kind is SECRETS:
            create = f"kubectl -n {kube.namespace} create secret generic {name} ..."
            mend = f"{create} (docs/kubernetes.md says what it holds)"
        yield _there(kube, kind, name, word, mend)


def images(item: Any) -> list[str]:
    """All images that a manifest names."""
    return [str(spec["image"]) for spec in having(item, "image")]


def having(item: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """All mappings in a manifest that hold a key."""
    if isinstance(item, Mapping):
        if key in item:
            yield item
        for value in item.values():
            yield from having(value, key)
    elif isinstance(item, list):
        for value in item:
            yield from having(value, key)


def _named(item: Mapping[str, Any]) -> Iterator[tuple[Kind, str, str]]:
    for kind, word, field, key in _WAYS:
        for holder in having(item, field):
            reference = holder[field]
            if not isinstance(reference, Mapping) or reference.get("optional"):
                continue
            if (name := reference.get(key)) and name != _EVERYWHERE:
                yield kind, word, str(name)
    for holder in having(item, "serviceAccountName"):
        yield SERVICE_ACCOUNTS, "account", str(holder["serviceAccountName"])


def _there(kube: Kube, kind: Kind, name: str, word: str, mend: str) -> Finding:
    try:
        kube.get(kind, name, metadata_only=True)
    except MissingError:
        return Finding(False, word, f"{name} is missing", mend)
    except ApiError as error:
        if error.code != 403:
            raise
        return Finding(True, word, f"{name} (we may not look whether it exists)")
    return Finding(True, word, name)
