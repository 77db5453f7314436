"""Where a version came from, and what came from something: `metaloom lineage`, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import RegistryError
from pipeline.deploy.copying import trail
from pipeline.deploy.registry import Registry
from pipeline.deploy.versions import BUNDLE_TAG, SMOKE_TAG, WEIGHTS_TAG, Version
from pipeline.runtime.lineage import CODE_FOLDERS, code_hash, code_root, file_hash, flatten
from pipeline.runtime.lineage import git_state as state_of_git

SHORTEST_PREFIX = 7
TRAINING_RUN_TAG, PARENT_RUN_TAG = "run.training", "run.parent"
FIELDS: Mapping[str, str] = {
    "git commit": "git.commit",
    "uncommitted changes": "git.dirty",
    "code": "code.hash",
    "dvc.lock": "dvc.lock",
    "params.yaml": "params.hash",
    "config": "config",
    "seeds": "seeds",
    "raw data": "data",
    "store": "store.digest",
    "episodes": "episodes",
    "training run": TRAINING_RUN_TAG,
    "parent run": PARENT_RUN_TAG,
    "compute fingerprint": "fingerprint",
    "bundle": BUNDLE_TAG,
    "weights": WEIGHTS_TAG,
    "smoke test": SMOKE_TAG,
    "decision": "gate.verdict",
    "reason": "gate.reason",
}
"""What is shown of a version, and the tag that holds it."""
_NAMES_OF_THINGS = (
    frozenset(FIELDS)
    - {"uncommitted changes", "config", "seeds", "smoke test"}
    - {
        *("decision", "reason"),
    }
)
_ABSENT = {"", "none", "absent", "unknown"}


@dataclass(frozen=True)
class Found:
    """A version that came from what was asked for."""

    version: int
    field: str
    value: str


def source_tags(root: Path) -> dict[str, str]:
    """What the repository says at a registration; what is not there is left out."""
    git = state_of_git(root)
    tags = {
        "git.commit": git.commit,
        "git.dirty": str(git.dirty).lower(),
        "code.hash": code_hash(code_root()),
        "dvc.lock": file_hash(root / "dvc.lock"),
        "params.hash": file_hash(root / "params.yaml"),
    }
    params = flatten(_yaml(root / "params.yaml"))
    seeds = {key: value for key, value in params.items() if key.split(".")[-1] == "seed"}
    for name, found in (("config", params), ("seeds", seeds), ("data", _raw_data(root))):
        if found:
            tags[name] = json.dumps(found, sort_keys=True)
    return tags


def of_version(version: Version) -> dict[str, Any]:
    """Everything that is recorded of a version, in order; None for what is not."""
    own = {"model": version.name, "version": version.number, "run": version.run_id or None}
    return {**own, **{name: _parsed(version.tags.get(tag)) for name, tag in FIELDS.items()}}


def missing(lineage: Mapping[str, Any]) -> list[str]:
    """The fields of which nothing is recorded."""
    return [name for name in ("run", *FIELDS) if lineage[name] is None]


def come_from(versions: Sequence[Version], text: str) -> list[Found]:
    """The versions with something of this name: a whole hash, commit or run id, or a beginning.

    Raises:
        RegistryError: the beginning is too short to name anything.
    """
    if len(text) < SHORTEST_PREFIX:
        raise RegistryError(
            f"{text!r} is neither the number of a version nor {SHORTEST_PREFIX} or more characters "
            "of a commit, hash or run id."
        )
    return [
        Found(version.number, name, value)
        for version in versions
        for name, value in dict.fromkeys(_things(version))
        if value.lower().startswith(text.lower())
    ]


def trace(registry: Registry, what: str) -> dict[str, Any]:
    """Either way: the lineage of a version, or the versions of a thing.

    Raises:
        RegistryError: there is no such version, or nothing came from that.
    """
    if what.isdecimal() and len(what) < SHORTEST_PREFIX:
        version = registry.version(int(what))
        lineage = of_version(version)
        aliases = [
            alias for alias, number in registry.aliases().items() if number == version.number
        ]
        promotions = [
            {"record": r.number, "kind": r.kind, "by": r.by, "at": r.at, "reason": r.reason}
            for r in registry.promotions()
            if r.champion == version.number
        ]
        record = {"aliases": aliases, "promotions": promotions, "missing": missing(lineage)}
        return {**lineage, **record, "copied": trail(version.tags)}
    found = come_from(registry.versions(), what)
    if not found:
        raise RegistryError(
            f"no version of {registry.name} came from {what} (MLflow at {registry.shown}). It is "
            f"compared with: {', '.join(sorted(_NAMES_OF_THINGS))}, run."
        )
    return {"model": registry.name, "versions": [vars(one) for one in found]}


def as_text(traced: Mapping[str, Any]) -> str:
    """For people: a field a line."""
    if "versions" in traced:
        lines = [
            f"version {one['version']}: {one['field']} {one['value']}" for one in traced["versions"]
        ]
        return "\n".join([f"{traced['model']}:", *lines])
    lines = [f"{traced['model']} version {traced['version']}"]
    if traced["aliases"]:
        lines[0] += f" (@{', @'.join(traced['aliases'])})"
    for name in ("run", *FIELDS):
        value = traced[name]
        shown = "not recorded" if value is None else value
        if isinstance(shown, dict):
            lines += [f"  {name}:", *(f"    {key}: {item}" for key, item in shown.items())]
        else:
            lines.append(f"  {name}: {shown}")
    lines += [
        f"  copied from {one['from']} by {one['by']} at {one['at']}: {one['reason']}"
        for one in traced.get("copied", ())
    ]
    lines += [
        f"  {one['kind']} by {one['by']} at {one['at']}: {one['reason']} (record {one['record']})"
        for one in traced["promotions"]
    ]
    return "\n".join(lines)


def _things(version: Version) -> Iterator[tuple[str, str]]:
    lineage = of_version(version)
    if version.run_id:
        yield "run", version.run_id
    for name in FIELDS:
        if name in _NAMES_OF_THINGS:
            yield from ((name, leaf) for leaf in _leaves(lineage[name]))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _parsed(text: str | None) -> Any:
    if text is None or text in _ABSENT:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _raw_data(root: Path) -> dict[str, str]:
    """What `preprocess` read that is not code, with DVC's hash of it."""
    try:
        deps = _yaml(root / "dvc.lock")["stages"]["preprocess"]["deps"]
        return {
            str(dep["path"]): str(dep["md5"])
            for dep in deps
            if str(dep["path"]).split("/")[0] not in CODE_FOLDERS
        }
    except (KeyError, TypeError):
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
