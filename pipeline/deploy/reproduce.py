"""A version's weights once more, from its record alone: its commit, its data, its seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.cluster.clone import Clone, only_runner, resolve_commit, take_clone
from pipeline.cluster.outcome import compute
from pipeline.cluster.raw_data import bring_raw_data
from pipeline.cluster.share import default_remote
from pipeline.core.config import load_value
from pipeline.core.errors import ConfigError, RegistryError
from pipeline.core.files import sha256_file, write_bytes
from pipeline.deploy.registry import Registry
from pipeline.deploy.versions import WEIGHTS_TAG, Version
from pipeline.engine.learner import WEIGHTS
from pipeline.runtime.context import fingerprint, make_deterministic
from pipeline.runtime.logs import say
from pipeline.store.reader import open_store

Verdict = Literal["identical", "fingerprint differs", "differs"]
_KIND = "reproduce"
_ANEW = ("--force", "--no-run-cache", "meta_train")
"""Of `dvc repro`: every stage up to this one computes, whatever a cache holds."""
_PARAMS, _MODEL = "params.yaml", Path("models/meta")


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    model: str
    version: int
    commit: str
    verdict: Verdict
    reason: str
    differs: list[str]
    """Of the compute fingerprint: `fact: recorded, here`."""
    weights: dict[str, str | None]
    """SHA-256, recorded and here; None here where nothing was computed."""
    store: dict[str, str | None]
    """Digest of the training data, the same way."""
    clone: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        lines = [f"{self.model} version {self.version}: {self.verdict}", f"  {self.reason}"]
        lines += [f"  {one}" for one in self.differs]
        for name, both in (("weights", self.weights), ("store", self.store)):
            lines.append(f"  {name}: recorded {both['recorded']}, here {both['here'] or '-'}")
        return "\n".join([*lines, *([f"  in {self.clone}"] if self.clone else [])])


def reproduce(
    registry: Registry,
    number: int,
    root: Path,
    *,
    anyway: bool = False,
) -> Reproduction:
    """Train a version anew in a clone of its commit, and compare the weights' hash with its tag.

    Everything is computed, from the raw data on; the registry and its server are only read. Killed
    and started again, training goes on from its checkpoint.

    Args:
        root: a repository that holds the version's commit.
        anyway: though another kind of machine made it, where other last digits are to be expected;
            without it such a version is told of and nothing is computed.

    Raises:
        RegistryError: the record does not name what is needed.
        ConfigError: the repository does not hold the commit.
        PipelineError: the data cannot be had, or a stage failed.
    """
    version = registry.version(number)
    tags = needed(version)
    with tempfile.TemporaryDirectory() as scratch:
        origin = registry.fetch(version, Path(scratch) / "bundle").learner.origin
    differs = _differences(origin)
    weights: dict[str, str | None] = {"recorded": tags[WEIGHTS_TAG], "here": None}
    store: dict[str, str | None] = {"recorded": tags["store.digest"], "here": None}
    verdict: Verdict = "fingerprint differs"
    reason, folder = "Nothing was computed: other last digits are to be expected here.", None
    if anyway or not differs:
        clone = _trained(root, tags["git.commit"], origin)
        folder = str(clone.folder)
        domain = load_value(clone.folder / _PARAMS, "preprocess.domain", str)
        store["here"] = open_store(clone.folder / "data/store" / domain).digest
        weights["here"] = sha256_file(clone.folder / _MODEL / WEIGHTS)
        verdict, reason = judge(weights, store, machine_differs=bool(differs))
    return Reproduction(
        model=registry.name,
        version=number,
        commit=tags["git.commit"],
        verdict=verdict,
        reason=reason,
        differs=differs,
        weights=weights,
        store=store,
        clone=folder,
    )


def judge(
    weights: Mapping[str, str | None], store: Mapping[str, str | None], *, machine_differs: bool
) -> tuple[Verdict, str]:
    """What two pairs of hashes say, and why."""
    if store["recorded"] != store["here"]:
        return "differs", (
            "The raw data gave another store, so that training began from other data. Are the "
            "typefaces, or the files that preprocess.source names, those of that time?"
        )
    if weights["recorded"] == weights["here"]:
        return "identical", "The weights are the registered ones, bit for bit."
    if machine_differs:
        return (
            "fingerprint differs",
            "The same data gave other weights, on another kind of machine.",
        )
    return "differs", "The same data gave other weights, on the same kind of machine."


def needed(version: Version) -> Mapping[str, str]:
    """The version's tags, once it is sure that they name what is needed.

    Raises:
        RegistryError: they do not.
    """
    needed = (WEIGHTS_TAG, "store.digest", "git.commit")
    unknown = [name for name in needed if version.tags.get(name, "") in ("", "none", "unknown")]
    what = f"version {version.number} of {version.name} cannot be reproduced:"
    if unknown:
        raise RegistryError(f"{what} its record does not name {', '.join(unknown)}.")
    if version.tags.get("git.dirty") == "true":
        raise RegistryError(
            f"{what} it came from a working tree that differed from its commit "
            f"{version.tags['git.commit'][:12]}. `metaloom run` trains commits alone."
        )
    return version.tags


def _differences(origin: Mapping[str, Any]) -> list[str]:
    """In what this machine differs from the one that trained; empty if it is of the same kind."""
    make_deterministic()  # as every worker does: the number of threads is part of it
    here, there = fingerprint(), origin.get("fingerprint") or {}
    found = [
        f"{name}: {there.get(name, 'not recorded')} there, {here[name]} here"
        for name in here
        if name != "id" and there.get(name) != here[name]
    ]
    kinds = {str(kind) for _, kind in origin.get("machines", ())}
    if len(kinds) > 1 or any("+" in kind for kind in kinds):
        found.append(f"it was trained by several kinds of machines: {', '.join(sorted(kinds))}")
    return found


def _trained(root: Path, name: str, origin: Mapping[str, Any]) -> Clone:
    try:
        commit = resolve_commit(root, name)
    except ConfigError as error:
        raise ConfigError(f"{error} `git fetch --all` brings those of the others.") from None
    with only_runner(root, commit):
        clone = take_clone(root, commit, None, _ANEW, kind=_KIND)
        for note in bring_raw_data(root, clone.folder, default_remote(clone.folder)):
            say("reproduce", note=note)
        _fix_engine(clone.folder / _PARAMS, origin.get("engine"))
        own = {"MLFLOW_TRACKING_URI": f"sqlite:///{clone.folder / 'mlflow.db'}"}
        compute(clone, {**own, "METALOOM_STORAGE": ""}, None, push=False)
        return clone.mark(done=True)


def _fix_engine(path: Path, engine: Mapping[str, Any] | None) -> None:
    """What `auto` chose then, which another machine, or another hour, might choose otherwise."""
    if engine is None:
        return
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["meta_train"].setdefault("engine", {}).update(engine)
    write_bytes(path, yaml.safe_dump(params, sort_keys=False).encode())
