"""Mistakes that the checker must find: an overlay, how to spoil it, and what must be said of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infra.manifests.documents import OVERLAYS, Document, Finding, look, mapping, named, render
from infra.manifests.table import Rule

_TABLE = Path(__file__).with_name("mistakes.yaml")


class Mistake(NamedTuple):
    """One of them."""

    name: str
    overlay: str
    rule: str
    """Which one finds it"""
    words: str
    """That the finding holds"""
    edit: str
    """Of EDITS"""
    arguments: Sequence[Any]


def mistakes(path: Path = _TABLE) -> list[Mistake]:
    """The table."""
    return [
        Mistake(
            **{key: one[key] for key in ("name", "overlay", "words")},
            rule=rule,
            edit=(edit := next(key for key in one if key in EDITS)),
            arguments=one[edit],
        )
        for rule, several in yaml.safe_load(path.read_text()).items()
        for one in several
    ]


def spoil(documents: Sequence[Document], mistake: Mistake) -> list[Document]:
    """A copy of the documents, with the mistake."""
    spoilt = copy.deepcopy(list(documents))
    EDITS[mistake.edit](spoilt, *mistake.arguments)
    return spoilt


def findings(mistake: Mistake, rules: Mapping[str, Rule]) -> list[Finding]:
    """Those of its rule that say what is wrong; none where the checker has missed it."""
    found = rules[mistake.rule](spoil(rendered(mistake.overlay), mistake))
    return [one for one in found if mistake.words in str(one)]


@cache
def rendered(overlay: str) -> Sequence[Document]:
    """An overlay by its name, rendered once."""
    return tuple(render(OVERLAYS / overlay))


def _put(documents: list[Any], target: str, path: str, value: Any) -> None:
    inner, last = _reach(_one(documents, target), path)
    inner[last] = value


def _drop(documents: list[Any], target: str, path: str) -> None:
    inner, last = _reach(_one(documents, target), path)
    del inner[last]


def _more(documents: list[Any], target: str, path: str, item: Any) -> None:
    inner, last = _reach(_one(documents, target), path)
    inner[last] = [*inner.get(last, []), item]


def _gone(documents: list[Any], target: str) -> None:
    documents.remove(_one(documents, target))


def _twin(documents: list[Any], target: str) -> None:
    documents.append(copy.deepcopy(_one(documents, target)))


def _added(documents: list[Any], document: dict[str, Any]) -> None:
    labels = dict(mapping(look(documents[0], "metadata.labels")))
    metadata = {"namespace": "metaloom", "labels": labels, **document["metadata"]}
    documents.append({**document, "metadata": metadata})


EDITS: Mapping[str, Callable[..., None]] = {
    "put": _put,
    "drop": _drop,
    "more": _more,
    "gone": _gone,
    "twin": _twin,
    "added": _added,
}


def _one(documents: list[Any], target: str) -> Any:
    kind, _, name = target.partition("/")
    found = named(documents, kind, name)
    assert found is not None, target
    return found


def _reach(value: Any, path: str) -> tuple[Any, Any]:
    """The mapping or list that holds the last step of a path, and that step."""
    parts = path.split("|") if "|" in path else path.split(".")
    *steps, last = [int(part) if part.isdecimal() else part for part in parts]
    for step in steps:
        value = value.setdefault(step, {}) if isinstance(value, dict) else value[step]
    return value, last
