"""Rendered documents, and ways into them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.core.errors import ConfigError, MachineError

Document = Mapping[str, Any]
Documents = Sequence[Document]
OVERLAYS = Path(__file__).parents[1] / "kubernetes" / "overlays"


class Finding(NamedTuple):
    """One mistake."""

    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        """All three in one line."""
        return f"{self.where}: {self.what}. {self.mend}"


class Place(NamedTuple):
    """A value, and how to find it again."""

    where: str
    value: Any


def overlay_names(folder: Path = OVERLAYS) -> list[str]:
    """Of all overlays, sorted."""
    return sorted(path.parent.name for path in folder.glob("*/kustomization.yaml"))


def render(folder: Path) -> list[Document]:
    """What `kubectl kustomize` makes of a folder, without a cluster or a network.

    Raises:
        MachineError: kubectl is not installed.
        ConfigError: kustomize refuses the folder.
    """
    if shutil.which("kubectl") is None:
        raise MachineError("kubectl is not installed. Install it; kustomize is part of it.")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(f"{folder} cannot be rendered: {why[0]}. Mend its kustomization.yaml.")
    return parse(done.stdout)


def parse(text: str) -> list[Document]:
    """The documents of a YAML stream, empty ones left out."""
    return [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]


def title(document: Document) -> str:
    """`Kind/name`."""
    return f"{document.get('kind')}/{mapping(document.get('metadata')).get('name')}"


def namespace(document: Document) -> str:
    """Empty where it has none."""
    return str(mapping(document.get("metadata")).get("namespace") or "")


def of_kind(documents: Documents, *kinds: str) -> list[Document]:
    """Those of some kinds."""
    return [one for one in documents if one.get("kind") in kinds]


def named(documents: Documents, kind: str, name: str, space: str | None = None) -> Document | None:
    """The one of a kind and name (and namespace); None where there is none."""
    for one in of_kind(documents, kind):
        if mapping(one.get("metadata")).get("name") == name and space in (None, namespace(one)):
            return one
    return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping; an empty one otherwise, for what schemas refuse anyway."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """The value if it is a list; an empty one otherwise."""
    return value if isinstance(value, list) else []


def find(value: Any, path: str, where: str = "") -> list[Place]:
    """All places that a path leads to; `[]` stands for every item of a list.

    `find(d, "spec.groups[].template")` has one place for each group that has a template.
    """
    places = [Place(where, value)]
    for step in path.split("."):
        key, many, _ = step.partition("[]")
        places = [
            Place(f"{p.where}.{key}" if p.where else key, p.value[key])
            for p in places
            if isinstance(p.value, Mapping) and p.value.get(key) is not None
        ]
        if many:
            places = [
                Place(f"{p.where}[{_item(i, item)}]", item)
                for p in places
                for i, item in enumerate(sequence(p.value))
            ]
    return places


def look(value: Any, path: str, otherwise: Any = None) -> Any:
    """The first place that a path leads to, or something else."""
    places = find(value, path)
    return places[0].value if places else otherwise


def walk(value: Any, where: str = "") -> Iterator[Place]:
    """Every mapping in a value, itself first, with its path."""
    if isinstance(value, Mapping):
        yield Place(where, value)
        for key, inner in value.items():
            yield from walk(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, f"{where}[{_item(index, item)}]")


def inside(documents: Iterable[Document]) -> Iterator[Place]:
    """Every mapping of every document."""
    for one in documents:
        for where, value in walk(one):
            yield Place(f"{title(one)}: {where}" if where else title(one), value)


def _item(index: int, item: Any) -> str:
    """An item's own name says more than its number."""
    name = item.get("name") or item.get("groupName") if isinstance(item, Mapping) else None
    return str(name or index)
