"""What Kubernetes itself would refuse: its schemas, and those of the custom resources."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from infra.manifests.documents import Document, Documents, Finding, title

VERSIONS = ("1.32", "1.37")
"""Of Kubernetes: the oldest that is still meant, and the newest that kubernetes-validate knows."""
CUSTOM_GROUPS = ("ray.io", "kueue.x-k8s.io")


def kubernetes_schema(documents: Documents) -> list[Finding]:
    """Built-in kinds against the schemas of Kubernetes, unknown fields refused."""
    found: list[Finding] = []
    for one in documents:
        if group_of(one) in CUSTOM_GROUPS:
            continue
        for version in VERSIONS:
            if (why := _refused(one, version)) is not None:
                found.append(
                    Finding(
                        title(one),
                        f"Kubernetes {version} refuses it: {why}",
                        "`kubectl explain` lists the fields and their types.",
                    )
                )
                break
    return found


def _refused(document: Document, version: str) -> str | None:
    import kubernetes_validate

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(dict(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(part) for part in error.path)
        return f"{where or 'the document'}: {error.message[:300]}"
    except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return f"there is no such kind ({error})"
    return None


def custom_schema(documents: Documents, crds: Path) -> list[Finding]:
    """Custom resources against the schemas of their CustomResourceDefinitions."""
    import jsonschema

    found = []
    for one in documents:
        if group_of(one) not in CUSTOM_GROUPS:
            continue
        schema = _schemas(crds).get((str(one.get("apiVersion")), str(one.get("kind"))))
        if schema is None:
            found.append(
                Finding(title(one), f"no definition of {one.get('apiVersion')}", f"Look at {crds}.")
            )
            continue
        for error in jsonschema.Draft202012Validator(schema).iter_errors(one):
            where = ".".join(str(part) for part in error.absolute_path)
            found.append(
                Finding(
                    f"{title(one)}: {where}",
                    f"the definition refuses it: {error.message[:300]}",
                    "`kubectl explain` lists the fields and their types.",
                )
            )
    return found


def has_custom(documents: Documents) -> bool:
    """Whether any document needs the definitions of custom resources."""
    return any(group_of(one) in CUSTOM_GROUPS for one in documents)


def group_of(document: Document) -> str:
    """Of the API; empty for Kubernetes' first one."""
    group, slash, _ = str(document.get("apiVersion")).rpartition("/")
    return group if slash else ""


@cache
def _schemas(crds: Path) -> Mapping[tuple[str, str], Mapping[str, Any]]:
    """By apiVersion and kind."""
    found = {}
    for path in sorted(crds.glob("*.yaml")):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            key = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schema = _closed(version["schema"]["openAPIV3Schema"])
            # The API server knows a name and a namespace, which definitions leave open.
            schema["properties"]["metadata"] = {"type": "object"}
            found[key] = schema
    return found


def _closed(schema: Any) -> Any:
    """The same, with unknown fields refused: the API server drops them without a word."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    is_open = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if isinstance(schema.get("properties"), dict) and made.get("type") == "object" and not is_open:
        made["additionalProperties"] = False
    return made
