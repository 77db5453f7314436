"""Where versions come from: a folder, or a registry whose aliases say which one serves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.core.errors import ConfigError
from pipeline.core.files import MANIFEST, sha256_file
from pipeline.deploy.bundle import Bundle, load_bundle
from pipeline.deploy.serve.admission import REFUSED_TAG, refusal
from pipeline.deploy.serve.messages import ModelRef

if TYPE_CHECKING:
    from pipeline.deploy.registry import Registry, Version

_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


@dataclass(frozen=True)
class Found:
    """A version that an alias names."""

    ref: ModelRef
    refusal: str | None
    """Why it may not serve, as far as its description tells."""


class Source(Protocol):
    """What a service asks; every call may raise a PipelineError."""

    @property
    def name(self) -> str:
        """Of the model."""

    def look(self) -> Mapping[str, Found]:
        """The versions of `champion` and `challenger` now, as far as there are any."""

    def fetch(self, ref: ModelRef, target: Path) -> Bundle:
        """A version's bundle, in a folder that may be used for it, verified."""

    def refuse(self, ref: ModelRef, why: str) -> None:
        """Leave word with the version that it may not serve."""

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """Make the champion before this one serve again everywhere, if it is still champion."""


@dataclass(frozen=True)
class FolderSource:
    """One bundle in a folder, which never changes."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    def look(self) -> Mapping[str, Found]:
        """The bundle, as champion."""
        digest = sha256_file(self.folder / MANIFEST) if self.folder.is_dir() else ""
        return {"champion": Found(ModelRef(name=self.name, version=None, bundle=digest), None)}

    def fetch(self, ref: ModelRef, target: Path) -> Bundle:
        """The bundle where it lies."""
        return load_bundle(self.folder, digest=ref.bundle or None)

    def refuse(self, ref: ModelRef, why: str) -> None:
        """There is nobody to tell."""

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """There is no other."""


@dataclass
class RegistrySource:
    """The versions of one registered model in MLflow."""

    root: Path
    name: str
    alias: str = "champion"
    """What it follows"""
    number: int | None = None
    """The one version that it serves, whatever the aliases say"""
    _told: dict[int, str] = field(default_factory=dict)

    def look(self) -> Mapping[str, Found]:
        """The versions of the aliases; one moved by hand is taken into the promotions' record."""
        registry = self._registry()
        found = {}
        if (serves := self._serves(registry)) is not None:
            found["champion"] = serves
        number = registry.aliases().get("challenger")
        if number is not None:
            found["challenger"] = registry.version(number)
        return {role: _found(one) for role, one in found.items()}

    def _serves(self, registry: Registry) -> Version | None:
        if self.number is not None:
            return registry.version(self.number)
        if self.alias == "champion":
            return registry.champion()
        number = registry.aliases().get(self.alias)
        return None if number is None else registry.version(number)

    def fetch(self, ref: ModelRef, target: Path) -> Bundle:
        """Download a version's bundle."""
        registry = self._registry()
        assert ref.version is not None
        return registry.fetch(registry.version(ref.version), target)

    def refuse(self, ref: ModelRef, why: str) -> None:
        """As a tag of the version, once."""
        if ref.version is None or self._told.get(ref.version) == why:
            return
        registry = self._registry()
        registry.tag(registry.version(ref.version), {REFUSED_TAG: why})
        self._told[ref.version] = why

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """By a record of promotions; another replica, or a person, may have been quicker."""
        registry = self._registry()
        follows = self.number is None and self.alias == "champion"
        if follows and registry.standing().champion == ref.version:
            registry.rollback(reason=why, only=ref.version)

    def _registry(self) -> Registry:
        # MLflow takes seconds to import; a service that starts from its cache does not wait for it.
        from pipeline.deploy.registry import Registry

        return Registry(self.root, self.name)


def _found(version: Version) -> Found:
    ref = ModelRef(name=version.name, version=version.number, bundle=version.digest)
    return Found(ref, refusal(version.tags))


def source_of(model: str, root: Path) -> Source:
    """What a person names: a bundle's folder, a registered model, or `models:/...` of one.

    Raises:
        ConfigError: it is none of these.
    """
    if (Path(model) / MANIFEST).is_file():
        return FolderSource(Path(model))
    if named := _URI.fullmatch(model):
        number = int(named[3]) if named[3] else None
        return RegistrySource(root, named[1], named[2] or "champion", number)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model):
        raise ConfigError(
            f"{model!r} is neither the folder of a bundle, nor a registered model, nor "
            "models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    return RegistrySource(root, model)
